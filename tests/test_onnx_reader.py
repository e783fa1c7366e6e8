"""ONNX exports read back: values as the shared quantizer stores them, facts as the spec has them, damage in a line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.onnx_tools import FLAVOURS, GOLDEN, TINY, export, load, made_up, order_of, places, random_tensors
from vlmedge import export as export_bundle
from vlmedge.errors import BundleError
from vlmedge.exporters import EXPORTERS, Grain, Readback
from vlmedge.exporters.choice import choose
from vlmedge.exporters.onnx.attention import rope_tables
from vlmedge.exporters.onnx.facts import rope_theta
from vlmedge.exporters.onnx.kinds import KINDS
from vlmedge.loading import describe
from vlmedge.quant_profiles import Scheme, profiles_for
from vlmedge.quant_profiles.grids import Grid, decode, encode
from vlmedge.session import F32
from vlmedge.spec import ModelSpec
from vlmedge.tensors import Tensor

ONNX = EXPORTERS["onnx"]
MATRIX = "decoder.layers.1.attn.out.weight"
STATED = {
    "decoder": {"layers", "kv_heads", "head_dim", "width", "vocab", "bidirectional_prefix", "norm", "norm_eps",
                "activation", "context", "rope_dims", "rope_theta"},
    "vision": {"layers", "heads", "width", "channels", "image_size", "patch_size", "norm_eps", "activation"},
    "projector": {"activation"},
    "region": {"activation"},
    "image": {"size", "resample", "mean", "std"},
    "prompt": {"stop", "banned", "max_tokens"},
}  # fmt: skip


def as_stored(tensor: Tensor, grain: Grain) -> F32:
    """What the shared quantizer keeps of a tensor, all at once."""
    values = tensor.read()
    if grain.bits > 8:
        return values.astype(np.float16).astype(np.float32) if grain.bits == 16 else values
    grids = [Grid(grain.bits, grain.group, symmetric) for symmetric in (True, False) if symmetric or grain.bits == 4]
    return np.stack([decode(encode(values, grid), grid) for grid in grids])


def check_tensors(back: Readback, tensors: Mapping[str, Tensor]) -> None:
    """Every tensor is there, in its shape, with just the values that its grain stores."""
    assert list(back.grains) == list(back.tensors)
    assert set(tensors) <= set(back.tensors)
    for name, found in back.tensors.items():
        want = tensors[name.partition("#")[0]]
        values, stored = found.read(), as_stored(want, back.grains[name])
        assert found.shape == values.shape == want.shape, name
        assert values.dtype == np.float32
        candidates = stored if back.grains[name].bits <= 8 else stored[None]
        assert any(np.array_equal(values, candidate) for candidate in candidates), (name, back.grains[name])


def stated(spec: ModelSpec, path: str) -> Any:
    return reduce(getattr, path.split("."), spec)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("profile", profiles_for("onnx"))
def test_every_profile_reads_back_as_it_was_stored(tmp_path, profile, flavour):
    out = export_bundle(GOLDEN, "onnx", profile, tmp_path / "out", verify=False, threads=1, flavour=flavour).path
    found = describe(GOLDEN)
    back = ONNX.read(found.spec, out)
    check_tensors(back, found.tensors)
    encodings = ONNX.encodings(choose("onnx", profile, flavour).order(found.spec))
    kinds = {name: KINDS[encoding.type] for name, encoding in encodings.items()}
    assert back.grains == {name: Grain(kind.bits, kind.block) for name, kind in kinds.items()}
    assert any("#prefill" in name for name in back.tensors) == (profile == "turbo")
    assert back.facts == {path: stated(found.spec, path) for path in back.facts}
    heads = {"decoder.heads"} if flavour == "ort" else set()
    assert set(back.facts) == heads | {f"{part}.{name}" for part, names in STATED.items() for name in names}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_reads_back_and_row_by_row(tmp_path, kind, flavour, tied):
    """An odd vocabulary: transposed 4-bit rows then begin in the middle of bytes. Rows of 140 have a short block."""
    spec = made_up({"vocab": 97, "tied_head": tied, "head_bias": not tied})
    tensors = random_tensors(spec)
    matrices = {
        name: Scheme("float", 32, native={"onnx": kind}) for name, shape in spec.tensors().items() if len(shape) == 2
    }
    plan = matrices if not KINDS[kind].floating else {name: Scheme("float", KINDS[kind].bits) for name in matrices}
    export(order_of(spec, plan, flavour=flavour), tensors, tmp_path)
    back = ONNX.read(spec, tmp_path)
    check_tensors(back, tensors)
    twice = (
        tied and flavour == "portable" and not KINDS[kind].floating and back.grains["decoder.embed.weight"].bits <= 8
    )
    assert [name for name in back.tensors if "#" in name] == (["decoder.embed.weight#2"] if twice else [])
    for tensor in back.tensors.values():
        whole = tensor.read().reshape(tensor.rows, -1)
        for start, stop in ((0, 1), (3, 4), (1, 6), (tensor.rows - 2, tensor.rows)):
            if 0 <= start < stop <= tensor.rows:
                assert np.array_equal(tensor.read_rows(start, stop), whole[start:stop])


def test_the_copy_for_prefill_may_be_stacked_otherwise(tmp_path):
    """Of other kinds, its matrices are apart; its biases then are a second copy too."""
    order = order_of(TINY, prefill={"decoder.layers.0.attn.q.weight": Scheme("int", 8, activations=8)})
    tensors = random_tensors(TINY)
    export(order, tensors, tmp_path)
    back = ONNX.read(TINY, tmp_path)
    check_tensors(back, tensors)
    assert back.grains["decoder.layers.0.attn.q.weight#prefill"] == Grain(8)
    assert {f"decoder.layers.0.attn.{part}.bias#prefill" for part in "qkv"} < set(back.tensors)


def test_other_blocks_state_their_facts(tmp_path):
    decoder = {"norm": "rms", "norm_eps": 1e-6, "activation": "silu", "gated": True, "parallel_residual": False,
               "bias": False, "kv_heads": 2, "rope_theta": 5e5, "rope_dims": 32, "bidirectional_prefix": False,
               "head_bias": False}  # fmt: skip
    spec = made_up(decoder, region=None)
    for flavour in FLAVOURS:
        export(order_of(spec, flavour=flavour), random_tensors(spec), tmp_path / flavour)
        facts = ONNX.read(spec, tmp_path / flavour).facts
        assert facts == {path: stated(spec, path) for path in facts}
        assert {"decoder.norm", "decoder.norm_eps", "decoder.rope_theta", "decoder.bidirectional_prefix"} < set(facts)
        assert ("decoder.activation" in facts) == (flavour == "ort")


@pytest.mark.parametrize("theta", [100.0, 1e4, 1.5e6, 5e5])
@pytest.mark.parametrize("dims", [4, 32, 128])
def test_theta_is_read_from_tables_or_not_at_all(theta, dims):
    spec = made_up({"rope_theta": theta, "rope_dims": dims, "context": 4096}).decoder
    cos, sin = rope_tables(spec)
    assert rope_theta(cos, sin) == theta
    assert rope_theta(cos[:, ::-1], sin[:, ::-1]) is None
    assert rope_theta(cos, np.roll(sin, 1, axis=0)) is None
    assert rope_theta(cos[:, :1], sin[:, :1]) is None
    assert rope_theta(*rope_tables(replace(spec, rope_theta=theta * 1.00005))) is None


Model = onnx.ModelProto


def change(folder: Path, graph: str, how: Callable[[Model], object]) -> None:
    """Change a graph in a folder of graphs."""
    path = folder / "onnx" / f"{graph}.onnx"
    model = load(path)
    how(model)
    path.write_bytes(model.SerializeToString())


def tensor_of(model: Model, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def fact(key: str, value: str, name: str = MATRIX) -> Callable[[Model], None]:
    """Change where an initializer lies."""

    def how(model: Model) -> None:
        next(entry for entry in tensor_of(model, name).external_data if entry.key == key).value = value

    return how


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """TINY in floats but for two matrices in blocks."""
    folder = tmp_path_factory.mktemp("reader")
    blocks = {f"vision.layers.0.attn.{part}.weight": Scheme("int", 4, group_size=32) for part in "qk"}
    export(order_of(TINY, blocks), random_tensors(TINY), folder)
    return folder


@pytest.fixture
def bundle(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def test_an_error_of_the_writer_shows(bundle):
    """Swapped places, transposed data and another matrix's scales are read as the graph would use them."""
    before = ONNX.read(TINY, bundle).tensors
    out, gate = (f"vision.layers.1.attn.{part}.weight" for part in ("out", "v"))
    q, k = (f"vision.layers.0.attn.{part}.weight" for part in "qk")

    def spoil(model: Model) -> None:
        a, b = tensor_of(model, out), tensor_of(model, gate)
        a.name, b.name = b.name, a.name
        scales = {f"{q}.scales": f"{k}.scales", f"{k}.scales": f"{q}.scales"}
        for node in model.graph.node:
            if node.op_type == "Cast" and node.input[0] in scales:
                node.input[0] = scales[node.input[0]]

    place = places(load(bundle / "onnx/decoder_model_merged.onnx"))[MATRIX]
    data = bundle / "onnx" / place.file
    raw = bytearray(data.read_bytes())
    matrix = before[MATRIX].read()
    raw[place.offset : place.offset + place.length] = np.ascontiguousarray(matrix.T).tobytes()
    expected = {name: before[name].read() for name in (q, k, out, gate)}
    data.write_bytes(raw)
    change(bundle, "vision_encoder", spoil)
    after = ONNX.read(TINY, bundle).tensors
    assert np.array_equal(after[MATRIX].read(), matrix.T.reshape(matrix.shape))
    assert np.array_equal(after[out].read(), expected[gate])
    assert np.array_equal(after[gate].read(), expected[out])
    assert not np.allclose(after[q].read(), expected[q], rtol=1e-3)


def test_nodes_that_disagree_state_what_no_spec_has(bundle):
    def other(model: Model) -> None:
        node = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
        next(entry for entry in node.attribute if entry.name == "epsilon").f = 1e-6

    change(bundle, "decoder_model_merged", other)
    assert ONNX.read(TINY, bundle).facts["decoder.norm_eps"] == (1e-6, 1e-5)


def without(op: str, *names: str) -> Callable[[Model], None]:
    """Take attributes from the nodes of one kind."""

    def how(model: Model) -> None:
        for node in model.graph.node:
            for entry in [entry for entry in node.attribute if node.op_type == op and entry.name in names]:
                node.attribute.remove(entry)

    return how


def other_type(op: str, new: str) -> Callable[[Model], None]:
    """Nodes of one kind become of another."""

    def how(model: Model) -> None:
        for node in model.graph.node:
            node.op_type = new if node.op_type == op else node.op_type

    return how


def unlike_tables(model: Model) -> None:
    """The rotary tables are constants no more, but as wide as before."""
    node = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    for tensor in model.graph.initializer:
        if tensor.name in node.input[7:9]:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 0, tensor.name))


def words_for_tables(model: Model) -> None:
    node = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    for tensor in model.graph.initializer:
        if tensor.name in node.input[7:9]:
            words = np.full(onnx.numpy_helper.to_array(tensor).shape, "no number", object)
            tensor.CopyFrom(onnx.numpy_helper.from_array(words, tensor.name))


VANISHED: dict[str, tuple[str, Callable[[Model], object], set[str]]] = {
    "norms": ("decoder_model_merged", other_type("LayerNormalization", "Identity"), {"norm", "norm_eps"}),
    "heads": ("decoder_model_merged", without("GroupQueryAttention", "num_heads"), {"heads"}),
    "base": ("decoder_model_merged", unlike_tables, {"rope_theta"}),
    "tables": ("decoder_model_merged", words_for_tables, {"context", "rope_dims", "rope_theta"}),
    "activation": ("decoder_model_merged", other_type("FastGelu", "Identity"), {"activation"}),
    "logits": ("decoder_model_merged", lambda m: m.graph.output.pop(0), {"vocab"}),
    "patches": ("vision_encoder", without("Conv", "strides"), {"patch_size"}),
    "tower's heads": ("vision_encoder", without("MultiHeadAttention", "num_heads"), {"heads"}),
    "tower's norms": ("vision_encoder", other_type("LayerNormalization", "Identity"), {"norm_eps"}),
    "tower's activation": ("vision_encoder", other_type("FastGelu", "Identity"), {"activation"}),
}


@pytest.mark.parametrize("damage", VANISHED)
def test_a_fact_that_is_gone_is_stated_as_none(bundle, damage):
    graph, how, gone = VANISHED[damage]
    part = "vision" if graph == "vision_encoder" else "decoder"
    change(bundle, graph, how)
    facts = ONNX.read(TINY, bundle).facts
    assert {path for path, value in facts.items() if value is None} == {f"{part}.{name}" for name in gone}
    assert {path for path, value in facts.items() if value != stated(TINY, path)} == {f"{part}.{name}" for name in gone}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_model_without_them_need_not_state_them(tmp_path, flavour):
    """No rotary dimensions, one pair of them, a base of many digits, activations that are spelt out."""
    for i, decoder in enumerate(({"rope_theta": 12345.0}, {"activation": "silu"}, {"activation": "quick_gelu"})):
        spec = made_up(decoder)
        export(order_of(spec, flavour=flavour), random_tensors(spec), tmp_path / str(i))
        facts = ONNX.read(spec, tmp_path / str(i)).facts
        assert facts == {path: stated(spec, path) for path in facts}
    for dims in (0, 2) if flavour == "portable" else ():
        spec = made_up({"rope_dims": dims})
        export(order_of(spec, flavour=flavour), random_tensors(spec), tmp_path / f"dims-{dims}")
        facts = ONNX.read(spec, tmp_path / f"dims-{dims}").facts
        assert facts == {path: stated(spec, path) for path in facts}
        assert ("decoder.rope_dims" in facts) == (dims > 0)


def reconfigured(folder: Path, **values: Any) -> Mapping[str, Any]:
    """The facts of an export whose JSON files say something else."""
    for name in ("preprocessor_config.json", "generation_config.json"):
        data = json.loads((folder / name).read_text())
        data |= {key: value for key, value in values.items() if key in data}
        (folder / name).write_text(json.dumps(data))
    return ONNX.read(TINY, folder).facts


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("size", "image.size"),
        ("resample", "image.resample"),
        ("image_mean", "image.mean"),
        ("image_std", "image.std"),
        ("eos_token_id", "prompt.stop"),
        ("max_new_tokens", "prompt.max_tokens"),
    ],
)
@pytest.mark.parametrize(
    "value",
    [None, [1], [[1], {}], {"height": [1]}, {"height": 1, "width": 2}, 77, -1, 1.5, True, "text", 10**400],
    ids=str,
)
def test_a_value_of_another_type_is_a_fact_that_differs(bundle, key, path, value):
    assert reconfigured(bundle, **{key: value})[path] != stated(TINY, path)


@pytest.mark.parametrize("value", [0, [0]])
def test_one_stop_token_may_stand_for_a_list_of_one(bundle, value):
    assert reconfigured(bundle, eos_token_id=value)["prompt.stop"] == TINY.prompt.stop == (0,)
    assert reconfigured(bundle, eos_token_id=5)["prompt.stop"] == (5,)


@pytest.mark.parametrize("text", ["[]", "5", "{", "", "null", "[" * 100_000])
def test_a_config_that_is_no_object_is_refused(bundle, text):
    (bundle / "generation_config.json").write_text(text)
    with pytest.raises(BundleError, match=r"generation_config\.json is missing or no JSON object"):
        ONNX.read(TINY, bundle)


def renamed(model: Model) -> None:
    tensor_of(model, MATRIX).name = "decoder.layers.9.attn.out.weight"


def reshaped(model: Model) -> None:
    del tensor_of(model, MATRIX).dims[:]
    tensor_of(model, MATRIX).dims.extend((32, 256))


DECODER = "decoder_model_merged"
CHANGES: dict[str, tuple[str, Callable[[Model], object], str]] = {
    "dropped": (DECODER, lambda m: m.graph.initializer.remove(tensor_of(m, MATRIX)), f"lacks {MATRIX}"),
    "renamed": (DECODER, renamed, "holds 'decoder.layers.9.attn.out.weight', which this model does not have"),
    "reshaped": (DECODER, reshaped, r"is FLOAT \[32, 256\], not FLOAT or FLOAT16 \[64, 128\]"),
    "twice": (DECODER, lambda m: m.graph.initializer.append(tensor_of(m, MATRIX)), "twice"),
    "type": (DECODER, lambda m: setattr(tensor_of(m, MATRIX), "data_type", 11), "has the type DOUBLE"),
    "unknown type": (DECODER, lambda m: setattr(tensor_of(m, MATRIX), "data_type", 99), "has the type 99"),
    "length": (DECODER, fact("length", "12"), "12 are kept"),
    "beyond": (DECODER, fact("offset", "9000000"), "ends in the middle of"),
    "negative": (DECODER, fact("offset", "-64"), "has the offset '-64'"),
    "outside": (DECODER, fact("location", "../vlmedge.json"), "outside the bundle"),
    "absolute": (DECODER, fact("location", "/etc/passwd"), "outside the bundle"),
    "nowhere": (DECODER, fact("location", "gone.onnx_data"), "is missing"),
    "no name": (DECODER, fact("location", "a" * 5000), "is missing"),
    "folder": (DECODER, fact("location", ""), "is missing"),
    "other operator": (
        "vision_encoder",
        lambda m: [setattr(node, "op_type", "Add") for node in m.graph.node if node.op_type == "MatMulNBits"],
        r"q.weight.codes is UINT8 \[48, 2, 16\] for Add",
    ),
    "other blocks": (
        "vision_encoder",
        lambda m: [setattr(a, "i", 64) for node in m.graph.node for a in node.attribute if a.name == "block_size"],
        r"codes is UINT8 \[48, 2, 16\], not UINT8 \[48, 1, 32\]",
    ),
    "no scales": (
        "vision_encoder",
        lambda m: m.graph.initializer.remove(tensor_of(m, "vision.layers.0.attn.q.weight.scales")),
        "lacks 'vision.layers.0.attn.q.weight.scales'",
    ),
}


@pytest.mark.parametrize("damage", CHANGES)
def test_a_changed_graph_is_refused_in_one_line(bundle, damage):
    graph, how, text = CHANGES[damage]
    change(bundle, graph, how)
    with pytest.raises(BundleError, match=text) as caught:
        ONNX.read(TINY, bundle)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "keep", "text"),
    [
        ("vision_projection.onnx", None, "vision_projection.onnx is missing"),
        ("embed_tokens.onnx", 0, "embed_tokens.onnx lacks decoder.embed.weight"),
        ("vision_encoder.onnx", 0.5, "vision_encoder.onnx is damaged"),
        ("vision_encoder.onnx_data", None, "vision_encoder.onnx_data', which is missing"),
        ("vision_encoder.onnx_data", 0.9, "vision_encoder.onnx_data ends in the middle of 'vision.layers.1"),
        ("region_size_encoder.onnx_data", 0, "region_size_encoder.onnx_data ends in the middle of"),
    ],
)
def test_a_cut_file_is_refused_in_one_line(bundle, file, keep, text):
    path = bundle / "onnx" / file
    if keep is None:
        path.unlink()
    else:
        raw = path.read_bytes()
        path.write_bytes(raw[: int(len(raw) * keep)])
    with pytest.raises(BundleError, match=text) as caught:
        ONNX.read(TINY, bundle)
    assert "\n" not in str(caught.value)


def test_a_file_that_shrinks_while_it_is_read(bundle):
    tensor = ONNX.read(TINY, bundle).tensors[MATRIX]
    (bundle / "onnx" / "decoder_model_merged.onnx_data").write_bytes(b"short")
    with pytest.raises(BundleError, match=f"cannot be read at {MATRIX}"):
        tensor.read()


def test_random_damage_is_read_or_refused(bundle):
    """Wherever a byte is wrong, there are values or one line of ours; sometimes it is not in what is read."""
    path = bundle / "onnx" / "vision_encoder.onnx"
    raw, rng, said = path.read_bytes(), np.random.default_rng(5), []
    for _ in range(300):
        spoiled = bytearray(raw[: rng.integers(1, len(raw))] if rng.random() < 0.3 else raw)
        for at in rng.integers(0, len(spoiled), rng.integers(1, 4)):
            spoiled[at] = rng.integers(0, 256)
        path.write_bytes(spoiled)
        try:
            back = ONNX.read(TINY, bundle)
        except BundleError as error:
            said.append(str(error))
        else:
            for name in TINY.vision.tensors():
                back.tensors[name].read()
    assert len(said) > 150
    assert not [text for text in said if "\n" in text]


def test_the_model_must_be_the_one_that_was_exported(exported):
    with pytest.raises(BundleError, match=r"lacks decoder\.layers\.2"):
        ONNX.read(made_up({"layers": 3}), exported)
    with pytest.raises(BundleError, match="which this model does not have"):
        ONNX.read(made_up({"layers": 1}), exported)
