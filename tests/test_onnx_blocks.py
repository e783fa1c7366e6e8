"""Every block of a spec as an ONNX graph: f32 graphs of both flavours compute what the reference modules do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from tests.onnx_tools import (
    FLAVOURS,
    TINY,
    Growing,
    export,
    graphs,
    job_of,
    made_up,
    opened,
    order_of,
    random_tensors,
    relative,
    run,
)
from vlmedge import imaging
from vlmedge.exporters import EXPORTERS
from vlmedge.quant_profiles import load_profile, plan
from vlmedge.reference.session import TorchSession
from vlmedge.runtimes.onnxruntime_session import OnnxSession
from vlmedge.session import F32
from vlmedge.spec import Activation, MlpProjector, ModelSpec
from vlmedge.tensors import ArrayTensor, Tensor

NEAR = 2e-6  # relative RMS of f32 sums in another order
RNG = np.random.default_rng(11)


def of(activation: Activation, joins_global: bool, region: bool, **decoder: Any) -> ModelSpec:
    return made_up(
        {"activation": activation, **decoder},
        vision=replace(TINY.vision, activation=activation, post_norm=joins_global),
        projector=MlpProjector(80, activation, joins_global),
        region=replace(TINY.region, activation=activation) if region and TINY.region else None,
    )


LLAMA = {"norm": "rms", "parallel_residual": False, "gated": True, "bias": False, "head_bias": False}
SPECS = {
    "phi": TINY,
    "llama": of("silu", False, False, **LLAMA, kv_heads=2, rope_dims=32, bidirectional_prefix=False),
    "tied": of("silu", True, True, **LLAMA, kv_heads=2, rope_dims=32, tied_head=True),
    "one-kv-head": of("quick_gelu", True, True, kv_heads=1, norm="rms", head_bias=False),
    "gated-phi": of("gelu", False, True, gated=True, bias=False, rope_dims=32),
    "gpt": of("gelu_tanh", False, False, parallel_residual=False, kv_heads=2, bidirectional_prefix=False),
    "wide-heads": of("gelu", True, False, heads=2, kv_heads=1, head_dim=64, rope_dims=32, norm="rms", bias=False),
    "no-rope": of("silu", False, False, rope_dims=0, kv_heads=2),
    "narrow": of("quick_gelu", False, True, parallel_residual=False, gated=True, tied_head=True, mlp_width=36),
}


class Case:
    """One spec in one flavour: its graphs, and the reference."""

    def __init__(self, spec: ModelSpec, flavour: str, out: Path) -> None:
        self.spec, self.flavour, self.out = spec, flavour, out
        self.tensors = random_tensors(spec)
        self.folder = export(order_of(spec, flavour=flavour), self.tensors, out)
        self.original = TorchSession(spec, self.tensors, threads=1)

    def graph(self, name: str) -> Any:
        return opened(self.folder / f"{name}.onnx")

    def growing(self) -> Growing:
        decoder = self.graph("decoder_model_merged")
        return Growing(lambda **feeds: run(decoder, **feeds), self.spec.decoder)


@pytest.fixture(scope="module", params=[(name, flavour) for name in SPECS for flavour in FLAVOURS], ids="-".join)
def case(request, tmp_path_factory) -> Case:
    name, flavour = request.param
    return Case(SPECS[name], flavour, tmp_path_factory.mktemp(f"{name}-{flavour}"))


def test_the_specs_cover_every_declared_fact():
    """Whoever adds a choice to a spec adds a case here."""
    decoders = [spec.decoder for spec in SPECS.values()]
    assert {d.activation for d in decoders} == set(get_args(Activation))
    assert {d.norm for d in decoders} == {"layer", "rms"}
    for fact in ("gated", "parallel_residual", "bias", "head_bias", "tied_head", "bidirectional_prefix"):
        assert {getattr(d, fact) for d in decoders} == {False, True}, fact
    assert {d.heads // d.kv_heads for d in decoders} == {1, 2, 4}
    assert {d.rope_dims < d.head_dim for d in decoders} == {False, True}
    ways = {(norm, parallel) for norm in ("layer", "rms") for parallel in (True, False)}
    assert {(d.norm, d.parallel_residual) for d in decoders} == ways
    for fact in ("post_norm", "activation"):
        assert len({getattr(s.vision, fact) for s in SPECS.values()}) > 1
    ways = {(joins, region) for joins in (True, False) for region in (True, False)}
    assert {(s.projector.joins_global, s.region is not None) for s in SPECS.values()} == ways


def pixels(spec: ModelSpec, crops: int) -> np.ndarray:
    return RNG.integers(0, 256, (crops, spec.image.size, spec.image.size, 3), np.uint8)


@pytest.mark.parametrize("crops", [1, 3])
def test_vision(case: Case, crops: int):
    crop = pixels(case.spec, crops)
    feeds = {"pixel_values": imaging.normalise(crop, case.spec.image)}
    got = run(case.graph("vision_encoder"), **feeds)["image_features"]
    assert relative(got, case.original.vision(crop)) < NEAR


@pytest.mark.parametrize("tiling", [(1, 1), (1, 2), (2, 2), (3, 1)])
def test_projection(case: Case, tiling: tuple[int, int]):
    spec = case.spec
    crops = 1 + tiling[0] * tiling[1] if spec.projector.joins_global else 1
    features = RNG.standard_normal((crops, spec.vision.tokens, spec.vision.width), np.float32)
    feeds = {"image_features": features}
    if spec.projector.joins_global:
        index = imaging.stitch_index(spec.image, tiling)
        rows, columns = (imaging.pool_matrix(n, spec.vision.grid) for n in index.shape)
        feeds |= {"stitch_index": index, "pool_rows": rows, "pool_columns": columns}
    want = case.original.project(features, tiling)
    got = run(case.graph("vision_projection"), **feeds)["image_embeds"]
    assert relative(got, want.reshape(1, spec.image_tokens, -1)) < NEAR


def test_embedding(case: Case):
    ids = np.array([0, 95, 7, 7, 31], np.int32)
    got = run(case.graph("embed_tokens"), input_ids=ids[None].astype(np.int64))["inputs_embeds"]
    assert np.array_equal(got[0], case.original.embed(ids))


def test_region_heads(case: Case):
    if case.spec.region is None:
        assert not list(case.folder.glob("region_*"))
        return
    width = case.spec.decoder.width
    for head, n in (("coord_encoder", 1), ("size_encoder", 2), ("coord_decoder", width), ("size_decoder", width)):
        x = RNG.random(n).astype(np.float32)
        got = run(case.graph(f"region_{head}"), input=x[None])["output"]
        assert relative(got[0], case.original.head(head, x)) < NEAR, head


def calls(spec: ModelSpec) -> list[tuple[F32, bool]]:
    """A prefix, a prompt of several positions, single ones, and several again: inputs and whether they see ahead."""
    x = RNG.standard_normal((40, spec.decoder.width), np.float32)
    parts = np.split(x, [spec.image_tokens + 1, 26, 27, 28])
    return list(zip(parts, (spec.decoder.bidirectional_prefix, False, False, False, False), strict=True))


def test_decoder_grows(case: Case):
    case.original.rewind(0)
    growing = case.growing()
    for x, ahead in calls(case.spec):
        takes = case.spec.decoder.bidirectional_prefix
        got = growing.forward(x, prefix=(growing.position + len(x) if ahead else 0) if takes else None)
        want = case.original.forward(x, bidirectional=ahead, hidden=True, every=True)
        assert relative(got["logits"][0], want.logits) < NEAR
        assert want.hidden is not None
        assert relative(got["hidden"][0, 0], want.hidden) < NEAR


def test_decoder_needs_no_prefix_length(case: Case):
    """A first call that is long enough for a picture sees ahead where the picture is; a shorter one does not."""
    d, n = case.spec.decoder, case.spec.image_tokens + 1
    x = RNG.standard_normal((n + 9, d.width), np.float32)
    for length in (n - 1, n, n + 9):
        case.original.rewind(0)
        growing = case.growing()
        whole = d.bidirectional_prefix and length >= n
        parts = [(x[:n], True), (x[n:length], False)] if whole else [(x[:length], False)]
        want = [case.original.forward(p, bidirectional=a, every=True).logits for p, a in parts if len(p)]
        assert relative(growing.forward(x[:length])["logits"][0], np.concatenate(want)) < NEAR
        after = case.original.forward(x[:2], every=True).logits
        assert relative(growing.forward(x[:2])["logits"][0], after) < NEAR


def test_logits_of_as_many_rows_as_asked_for(case: Case):
    x = RNG.standard_normal((7, case.spec.decoder.width), np.float32)
    every = case.growing().forward(x)["logits"]
    for keep in (1, 3, 99):
        got = case.growing().forward(x, keep=keep)["logits"]
        assert relative(got, every[:, -keep:]) < NEAR


def test_the_session_equals_the_original(case: Case):
    """Flavour "ort": one buffer, written in place; "portable": growing. Rewound, and asked again."""
    case.original.rewind(0)
    session = OnnxSession(case.spec, case.out, threads=1)
    made = [(x, ahead) for x, ahead in calls(case.spec)]
    for start in (0, 0, 1):  # a second time from nothing, a third time from behind the prefix
        kept = len(made[0][0]) * start
        case.original.rewind(kept)
        session.rewind(kept)
        for x, ahead in made[start:]:
            want = case.original.forward(x, bidirectional=ahead, hidden=True)
            got = session.forward(x, bidirectional=ahead, hidden=True)
            assert relative(got.logits, want.logits) < NEAR
            assert got.hidden is not None
            assert want.hidden is not None
            assert relative(got.hidden, want.hidden) < NEAR
    assert session.position == case.original.position
    session.close()


def test_who_sees_whom_decides_much():
    """The comparisons above would show a wrong mask, wrong positions and a wrong head by far."""
    original = TorchSession(TINY, random_tensors(TINY), threads=1)
    x = RNG.standard_normal((17, 64), np.float32)
    ahead = original.forward(x, bidirectional=True, every=True).logits
    original.rewind(0)
    causal = original.forward(x, every=True).logits
    assert relative(ahead, causal) > 0.1
    original.rewind(0)
    swapped = original.forward(x[[1, 0, *range(2, 17)]], bidirectional=True, every=True).logits
    assert relative(swapped[2:], ahead[2:]) > 0.01


def test_the_last_position_of_the_context(tmp_path: Path):
    case = Case(TINY, "ort", tmp_path)
    x = RNG.standard_normal((64, 64), np.float32)
    want = case.original.forward(x[:63], every=True).logits
    session = OnnxSession(TINY, tmp_path, threads=1)
    assert relative(session.forward(x[:63], every=True).logits, want) < NEAR
    assert relative(session.forward(x[63:]).logits, case.original.forward(x[63:]).logits) < NEAR


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_rows_of_zeros_give_no_nan(tmp_path: Path, flavour: str):
    """Rows of zeros in every matrix, in every kind of them: padded vocabularies and dead channels are real."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in random_tensors(TINY).items():
        values = tensor.read().copy()
        if values.ndim > 1:
            values[::3] = 0
        tensors[name] = ArrayTensor(values)
    for profile in ("w8a8", "q4", "q4-fast"):
        order = order_of(TINY, plan(load_profile(profile), TINY), flavour=flavour)
        export(order, tensors, tmp_path / profile)
        session = OnnxSession(TINY, tmp_path / profile, threads=1)
        assert np.isfinite(session.forward(np.zeros((20, 64), np.float32), every=True).logits).all()
        assert np.isfinite(session.vision(np.zeros((1, 28, 28, 3), np.uint8))).all()


def test_graphs_are_built_without_weights(tmp_path: Path):
    """What a graph is depends on the spec and the plan alone."""

    def of_seed(seed: int) -> Mapping[str, bytes]:
        folder = export(order_of(TINY), random_tensors(TINY, seed), tmp_path / str(seed))
        return {name: model.SerializeToString(deterministic=True) for name, model in graphs(folder).items()}

    assert of_seed(1) == of_seed(2)
    assert EXPORTERS["onnx"].encodings(job_of(order_of(TINY), {}, tmp_path / "none").order)
