"""The decoder in ONNX Runtime on small graphs that keep the contract; damaged files; the cache of prepacked graphs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vlmedge.errors import (
    BundleError,
    ContextError,
    OutputError,
    RuntimeFailedError,
    UnsupportedError,
    UsageError,
)
from vlmedge.runtimes.ort_decoder import Decoder
from vlmedge.runtimes.ort_engine import Engine
from vlmedge.runtimes.ort_errors import computing, loading
from vlmedge.runtimes.ort_kv import GrowingKv, SharedKv
from vlmedge.runtimes.ort_prepacked import PrepackedGraphs
from vlmedge.runtimes.ort_saturation import GRAPH, saturates
from vlmedge.runtimes.ort_units import CPU, choose_provider
from vlmedge.spec import DecoderSpec

ENGINE = Engine(CPU, 1)
WIDTH, HEADS, KV_HEADS, DIM, VOCAB, CONTEXT = 64, 4, 2, 16, 50, 48
SPEC = DecoderSpec(
    layers=1, width=WIDTH, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM, mlp_width=8, vocab=VOCAB, context=CONTEXT,
    norm="layer", norm_eps=1e-5, activation="gelu", gated=False, parallel_residual=True, rope_dims=DIM,
    rope_theta=1e4, bias=True, head_bias=True, tied_head=False, bidirectional_prefix=True,
)  # fmt: skip
RNG = np.random.default_rng(4)
WEIGHTS = {
    "qkv": RNG.normal(0, 0.3, (WIDTH, (HEADS + 2 * KV_HEADS) * DIM)),
    "out": RNG.normal(0, 0.3, (HEADS * DIM, WIDTH)),
    "head": RNG.normal(0, 0.3, (WIDTH, VOCAB)),
}
X = RNG.normal(0, 1, (30, WIDTH)).astype(np.float32)


class Nodes(list):
    """Nodes that name their own outputs."""

    def add(self, op, *inputs, count=1, out=None, **attributes):
        names = out or [f"{op}{len(self)}_{i}" for i in range(count)]
        domain = "com.microsoft" if op == "GroupQueryAttention" else ""
        self.append(helper.make_node(op, list(inputs), names, domain=domain, **attributes))
        return names if len(names) > 1 else names[0]


def decoder(path: Path, kv="shared", kv_type="f32", prefix=True, scale=1.0, layers=1) -> Path:
    """One attention layer as the contract of ONNX bundles has it, written to `path`."""
    nodes, constants = Nodes(), {name: (w * scale).astype(np.float32) for name, w in WEIGHTS.items()}
    angles = np.outer(np.arange(CONTEXT), 1e4 ** (-np.arange(0, DIM, 2) / DIM))
    constants |= {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    constants |= {"s": np.full((1, KV_HEADS, 1, DIM), 0.08, np.float32), "unit": np.float32(1), "zero": np.int8(0)}
    constants |= {f"i{n}": np.int64(n) for n in (0, 1)} | {"axis0": np.int64([0]), "axis1": np.int64([1])}
    constants |= {"seen": np.float32(0), "unseen": np.float32(-1e30), "one32": np.int32(1)}
    constants |= {"axes01": np.int64([0, 1]), "end": np.int64([2**62]), "back": np.int64([-1])}
    constants |= {"num_logits_to_keep": np.int64(1)} | ({"prefix_len": np.int64(12)} if prefix else {})
    new, total = (
        nodes.add("Squeeze", nodes.add("Shape", x, start=1, end=2), "axis0")
        for x in ("inputs_embeds", "attention_mask")
    )
    rows = nodes.add("Unsqueeze", nodes.add("Range", nodes.add("Sub", total, new), total, "i1"), "axis1")
    keys = nodes.add("Unsqueeze", nodes.add("Range", "i0", total, "i1"), "axis0")
    seen = nodes.add("LessOrEqual", keys, rows)
    if prefix:
        seen = nodes.add("Or", seen, nodes.add("Less", keys, "prefix_len"))
    bias = nodes.add("Unsqueeze", nodes.add("Where", seen, "seen", "unseen"), "axes01")
    count = nodes.add("Cast", total, to=TensorProto.INT32)
    last = nodes.add("Unsqueeze", nodes.add("Sub", count, "one32"), "axis0")
    x = "inputs_embeds"
    for i in range(layers):
        past = [f"past_key_values.{i}.key", f"past_key_values.{i}.value"]
        presents = [f"present.{i}.key", f"present.{i}.value"]
        common = [last, count, "cos", "sin", "", bias]
        facts = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "do_rotary": 1, "causal": 0}
        packed = nodes.add("MatMul", x, "qkv")
        if kv_type == "f32":
            mixed, *_ = nodes.add(
                "GroupQueryAttention", packed, "", "", *past, *common, out=[f"mixed{i}", *presents], **facts
            )
        else:
            mixed = f"mixed{i}"
            nodes.append(_quantized(i, nodes.add("Equal", new, total), packed, past, common, [mixed, *presents], facts))
        x = nodes.add("Add", x, nodes.add("MatMul", mixed, "out"))
    start = nodes.add("Unsqueeze", nodes.add("Neg", "num_logits_to_keep"), "axis0")
    nodes.add("MatMul", nodes.add("Slice", x, start, "end", "axis1"), "head", out=["logits"])
    nodes.add("Slice", x, "back", "end", "axis1", out=["hidden"])
    kv_element = TensorProto.FLOAT if kv_type == "f32" else TensorProto.INT8
    f32, i64, value = TensorProto.FLOAT, TensorProto.INT64, helper.make_tensor_value_info
    parts = [f"{i}.{part}" for i in range(layers) for part in ("key", "value")]
    inputs = [value("inputs_embeds", f32, [1, "S", WIDTH]), value("attention_mask", i64, [1, "T"])]
    inputs += [value(f"past_key_values.{p}", kv_element, [1, KV_HEADS, "P", DIM]) for p in parts]
    inputs += [value(name, i64, []) for name in ("num_logits_to_keep", *(["prefix_len"] if prefix else []))]
    outputs = [value("logits", f32, [1, "L", VOCAB]), value("hidden", f32, [1, 1, WIDTH])]
    outputs += [value(f"present.{p}", kv_element, [1, KV_HEADS, "Q", DIM]) for p in parts]
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    helper.set_model_props(model, {"vlmedge.kv": kv, "vlmedge.kv_type": kv_type})
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}_data", size_threshold=64)
    return path


def _quantized(i, fresh, packed, past, common, outputs, facts):
    """The first call attends in f32 and rounds afterwards; later ones work on the int8 buffers."""
    first, later = Nodes(), Nodes()
    names = [f"first{i}_{part}" for part in ("mixed", "key", "value")]
    first.add("GroupQueryAttention", packed, "", "", "", "", *common, out=names, **facts)
    rounded = [first.add("QuantizeLinear", first.add("Div", n, "s"), "unit", "zero", out=[f"{n}8"]) for n in names[1:]]
    scales = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    done = [f"later{i}_{part}" for part in ("mixed", "key", "value")]
    later.add("GroupQueryAttention", packed, "", "", *past, *common, "", "s", "s", out=done, **facts, **scales)
    kinds = (TensorProto.FLOAT, TensorProto.INT8, TensorProto.INT8)
    branches = []
    for name, nodes, made in (("first", first, [names[0], *rounded]), ("later", later, done)):
        infos = [helper.make_tensor_value_info(n, kind, None) for n, kind in zip(made, kinds, strict=True)]
        branches.append(helper.make_graph(nodes, name, [], infos))
    return helper.make_node("If", [fresh], outputs, then_branch=branches[0], else_branch=branches[1])


@pytest.fixture(params=["shared", "growing"])
def kv(request) -> str:
    return request.param


@pytest.fixture
def opened(tmp_path, kv) -> Decoder:
    decoder(tmp_path / "decoder_model_merged.onnx", kv)
    return Decoder(tmp_path, SPEC, ENGINE)


def forward(model: Decoder, x, bidirectional=False, every=True):
    return model.forward(x, bidirectional=bidirectional, hidden=True, every=every)


def test_the_parts_equal_the_whole(opened):
    whole = forward(opened, X)
    assert whole.logits.shape == (30, VOCAB)
    opened.rewind(0)
    parts = [forward(opened, x).logits for x in (X[:12], X[12:17], X[17:18], X[18:])]
    np.testing.assert_allclose(np.concatenate(parts), whole.logits, atol=2e-5)
    assert opened.position == 30


def test_the_last_positions_logits_and_hidden_state(opened):
    every = forward(opened, X)
    opened.rewind(0)
    one = forward(opened, X, every=False)
    assert one.logits.shape == (VOCAB,)
    np.testing.assert_allclose(one.logits, every.logits[-1], atol=1e-5)
    np.testing.assert_allclose(one.hidden @ WEIGHTS["head"].astype(np.float32), one.logits, atol=1e-5)
    assert opened.forward(X[:1], bidirectional=False, hidden=False, every=False).hidden is None


def test_what_a_step_gave_stays_what_it_was(opened):
    first = forward(opened, X[:5])
    kept = first.logits.copy(), first.hidden.copy()
    forward(opened, X[5:10])
    np.testing.assert_array_equal(first.logits, kept[0])
    np.testing.assert_array_equal(first.hidden, kept[1])


def test_a_bidirectional_block_and_then_causal(opened):
    causal = forward(opened, X[:12])
    opened.rewind(0)
    block = forward(opened, X[:12], bidirectional=True)
    assert np.abs(block.logits - causal.logits).max() > 0.01
    np.testing.assert_allclose(block.logits[-1], causal.logits[-1], atol=1e-5)  # one layer: the last saw all before too
    opened.rewind(0)
    swapped = forward(opened, X[[0, *range(2, 12), 1]], bidirectional=True)  # rotary positions tell the order
    assert np.abs(swapped.logits - block.logits).max() > 0.01


def test_a_rewound_cache_answers_exactly_as_before(opened):
    forward(opened, X[:12], bidirectional=True)
    first = [forward(opened, x).logits for x in (X[12:20], X[20:21])]
    opened.rewind(12)
    forward(opened, X[21:28])
    opened.rewind(12)
    again = [forward(opened, x).logits for x in (X[12:20], X[20:21])]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    opened.rewind(99)
    assert opened.position == 21


def test_shared_buffers_are_written_in_place(tmp_path):
    decoder(tmp_path / "decoder_model_merged.onnx")
    model = Decoder(tmp_path, SPEC, ENGINE)
    assert isinstance(model._kv, SharedKv)
    keys = model._kv._buffers[0]
    forward(model, X[:7])
    before = keys.copy()
    assert keys[0, :, :7].any(axis=-1).all()
    assert not keys[0, :, 7:].any()
    forward(model, X[7:8])
    np.testing.assert_array_equal(keys[0, :, :7], before[0, :, :7])
    assert keys[0, :, 7].any()
    assert not keys[0, :, 8:].any()


def test_growing_keeps_no_more_than_what_is_alive(tmp_path):
    decoder(tmp_path / "decoder_model_merged.onnx", "growing")
    model = Decoder(tmp_path, SPEC, ENGINE)
    assert isinstance(model._kv, GrowingKv)
    forward(model, X[:7])
    model.rewind(3)
    forward(model, X[3:5])
    assert model._kv._values[0].shape() == [1, KV_HEADS, 5, DIM]


def test_an_int8_cache_is_filled_by_the_first_call_and_then_in_place(tmp_path):
    decoder(tmp_path / "a/decoder_model_merged.onnx")
    exact = Decoder(tmp_path / "a", SPEC, ENGINE)
    decoder(tmp_path / "b/decoder_model_merged.onnx", kv_type="int8")
    model = Decoder(tmp_path / "b", SPEC, ENGINE)
    keys = model._kv._buffers[0]
    assert keys.dtype == np.int8
    np.testing.assert_allclose(forward(model, X[:12]).logits, forward(exact, X[:12]).logits, atol=1e-5)
    assert keys[0, :, :12].any(axis=-1).all()
    assert not keys[0, :, 12:].any()
    steps = [forward(m, X[12:20]).logits for m in (model, exact)]
    assert 0 < np.linalg.norm(steps[0] - steps[1]) / np.linalg.norm(steps[1]) < 0.03
    assert keys[0, :, :20].any(axis=-1).all()
    model.rewind(12)
    np.testing.assert_array_equal(forward(model, X[12:20]).logits, steps[0])
    model.rewind(0)
    first = forward(model, X[:12]).logits
    model.rewind(0)
    np.testing.assert_array_equal(forward(model, X[:12]).logits, first)


@pytest.mark.parametrize("kv_type", ["f32", "int8"])
def test_prefill_has_a_graph_of_its_own(tmp_path, kv_type):
    decoder(tmp_path / "decoder_model_merged.onnx", kv_type=kv_type)
    plain = Decoder(tmp_path, SPEC, ENGINE)
    decoder(tmp_path / "decoder_prefill.onnx", kv_type=kv_type, scale=1.5)
    model = Decoder(tmp_path, SPEC, ENGINE)
    assert np.abs(forward(model, X[:9]).logits - forward(plain, X[:9]).logits).max() > 0.1
    with_prefill = forward(model, X[9:10]).logits
    model._prefill, model.position = model._graph, 9  # the same step once more, from the same buffers
    np.testing.assert_array_equal(forward(model, X[9:10]).logits, with_prefill)
    model.rewind(0)
    plain.rewind(0)
    np.testing.assert_array_equal(forward(model, X[:8]).logits, forward(plain, X[:8]).logits)


def test_what_does_not_fit_is_refused_with_the_numbers(opened):
    forward(opened, X)
    with pytest.raises(ContextError, match=r"49 positions do not fit .* context of 48: 30 are taken, 19 were"):
        forward(opened, X[:19])
    forward(opened, X[:18])
    assert opened.position == CONTEXT
    with pytest.raises(ContextError, match="49 positions"):
        forward(opened, X[:1])
    opened.rewind(10)
    forward(opened, X[:1])
    with pytest.raises(ValueError, match="not empty"):
        forward(opened, X[:0])


def test_a_causal_graph_refuses_a_bidirectional_block(tmp_path):
    decoder(tmp_path / "decoder_model_merged.onnx", prefix=False)
    model = Decoder(tmp_path, SPEC, ENGINE)
    with pytest.raises(UnsupportedError, match="causal throughout"):
        forward(model, X[:3], bidirectional=True)
    forward(model, X[:1], bidirectional=True)


def test_inputs_of_the_wrong_width_leave_the_cache_as_it_was(opened):
    forward(opened, X[:5])
    with pytest.raises(RuntimeFailedError, match="2 positions after 5") as error:
        forward(opened, X[:2, :3])
    assert "\n" not in str(error.value)
    step = forward(opened, X[5:6])
    opened.rewind(5)
    np.testing.assert_array_equal(forward(opened, X[5:6]).logits, step.logits)


def test_another_model_is_refused(tmp_path):
    decoder(tmp_path / "decoder_model_merged.onnx")
    with pytest.raises(BundleError, match="holds a model of"):
        Decoder(tmp_path, replace(SPEC, layers=2), ENGINE)
    with pytest.raises(BundleError, match="holds a model of"):
        Decoder(tmp_path, replace(SPEC, vocab=51), ENGINE)
    decoder(tmp_path / "decoder_prefill.onnx", kv_type="int8")
    with pytest.raises(BundleError, match=r"decoder_prefill\.onnx does not share the KV cache"):
        Decoder(tmp_path, SPEC, ENGINE)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [
    lambda path: path.unlink(),
    _cut,
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"no graph at all" * 9),
    lambda path: path.write_bytes(path.read_bytes().replace(b"MatMul", b"MatMux")),
    lambda path: path.with_name(path.name + "_data").unlink(),
    lambda path: _cut(path.with_name(path.name + "_data")),
])  # fmt: skip
def test_damaged_files_are_one_line(tmp_path, damage, capfd):
    damage(decoder(tmp_path / "decoder_model_merged.onnx"))
    with pytest.raises(BundleError, match=r"decoder_model_merged\.onnx") as error:
        Decoder(tmp_path, SPEC, ENGINE)
    assert "\n" not in str(error.value)
    assert "export it again" in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_providers_by_their_short_names():
    assert choose_provider(None) == choose_provider("cpu") == choose_provider("CPUExecutionProvider") == CPU
    with pytest.raises(UsageError, match=r"has no unit 'warp'; known: .*cpu, cuda"):
        choose_provider("warp")


def test_a_provider_is_never_replaced(tmp_path):
    path = decoder(tmp_path / "decoder_model_merged.onnx")
    with (
        pytest.warns(UserWarning, match="not in available provider names"),
        pytest.raises(RuntimeFailedError, match=r"was to run on CUDA\w+; ONNX Runtime offers CPU"),
    ):
        Engine("CUDAExecutionProvider", 1).open(path)


def test_prepacked_graphs_are_written_once(tmp_path):
    path = decoder(tmp_path / "bundle/decoder_model_merged.onnx")
    graphs = PrepackedGraphs(tmp_path / "cache", ENGINE)
    model = Decoder(path.parent, SPEC, graphs)
    expected = forward(Decoder(path.parent, SPEC, ENGINE), X).logits
    np.testing.assert_allclose(forward(model, X).logits, expected, atol=1e-5)
    (copy,) = graphs.folder.iterdir()
    written = {file.name: file.stat().st_mtime_ns for file in copy.iterdir()}
    Decoder(path.parent, SPEC, graphs)
    assert {file.name: file.stat().st_mtime_ns for file in copy.iterdir()} == written
    _cut(copy / path.name)
    np.testing.assert_allclose(forward(Decoder(path.parent, SPEC, graphs), X).logits, expected, atol=1e-5)
    decoder(path, scale=1.5)
    other = forward(Decoder(path.parent, SPEC, graphs), X).logits
    assert np.abs(other - expected).max() > 0.1
    (new,) = graphs.folder.iterdir()
    assert new != copy


def test_the_cache_folder_of_prepacked_graphs_cannot_be_written(tmp_path):
    path = decoder(tmp_path / "decoder_model_merged.onnx")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot keep the graphs that memory='lean' maps: Not a dir") as error:
        PrepackedGraphs(tmp_path / "file/cache", ENGINE).open(path)
    assert "leave memory='fast', or choose another folder for caches (on Linux by XDG_CACHE_HOME)" in str(error.value)
    path.unlink()
    with pytest.raises(BundleError, match="is missing"):
        PrepackedGraphs(tmp_path / "cache", ENGINE).open(path)


def test_the_graph_that_tries_the_processors_products():
    value = helper.make_tensor_value_info
    inputs = [value("a", TensorProto.UINT8, ["m", "k"]), value("b", TensorProto.INT8, ["k", "n"])]
    node = helper.make_node("MatMulInteger", ["a", "b"], ["c"])
    graph = helper.make_graph([node], "g", inputs, [value("c", TensorProto.INT32, ["m", "n"])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10, producer_name="")
    assert model.SerializeToString(deterministic=True) == GRAPH


def test_processors_with_exact_products_keep_their_fast_kernels():
    exact = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"}
    info = Path("/proc/cpuinfo")
    if info.is_file() and exact & set(info.read_text().split()):
        assert not saturates()
    entry = ENGINE._options(False, True, None).get_session_config_entry
    assert entry("session.x64quantprecision") == str(int(saturates()))


def test_no_memory_is_not_a_damaged_file(tmp_path):
    for error, said in ((MemoryError(), "out of memory"), (RuntimeError("std::bad_alloc\n"), "std::bad_alloc")):
        said = f"a.onnx cannot be run by this ONNX Runtime: {said}$"
        with pytest.raises(RuntimeFailedError, match=said), loading(tmp_path / "a.onnx"):
            raise error
    with pytest.raises(RuntimeFailedError, match=r"failed in the decoder: out of memory$"), computing("the decoder"):
        raise MemoryError
