"""The gate against every fault of the catalogue: each is caught, at the stage where it bites."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import pytest

from vlmedge import pipeline
from vlmedge.errors import VerificationError
from vlmedge.loading import describe
from vlmedge.parity.faults import FAULTS, REFUSED, Given, Running, Setting, Shared, Written, attempt, settled
from vlmedge.parity.report import STAGES

FORMATS = ("gguf", "onnx")
# The issue's own list, each in one format; everything else, and the other format, takes minutes.
QUICK = {
    "gguf": (
        "decoder-q-k", "rotary-interleaved", "patch-transposed", "post-norm-dropped", "decoder-eps-1e-6",
        "rotary-all-dims", "head-tied", "vocabulary-stale", "template-token", "causal-picture", "bos-dropped",
        "kv-loses", "kv-stale", "no-global", "bicubic", "margin-less", "told-filter",
    ),
    "onnx": (
        "decoder-k-v", "rotary-half-split", "patch-bgr", "tower-last-layer", "tower-eps-1e-12", "tower-gelu-exact",
        "projector-halves", "tower-bias", "rotary-half-dims", "mask-fact", "merges-stale", "prefix-short",
        "hidden-early", "local-by-columns", "bins-flipped", "bilinear", "crops-by-columns", "global-crop-dropped",
        "crops-fewer", "sizes-other-scale",
    ),
}  # fmt: skip
# Where there are scales and zero points, and where noise could hide what is not compared in steps of a grid.
COARSE = (
    "scales-zero", "scales-shifted", "scale-of-a-row", "zero-points", "nibbles", "data-late", "prefill-scales-zero",
    "kv-scales", "tower-q-k", "decoder-q-k", "decoder-bias", "decoder-eps-1e-12", "decoder-last-layer",
    "projector-halves", "bins-flipped", "causal-picture", "bos-dropped", "kv-loses", "no-global", "hidden-normed",
    "height-first", "bicubic",
)  # fmt: skip
QUANTIZED = [("gguf", "q8"), ("gguf", "q4"), ("gguf", "q5"), ("onnx", "q8"), ("onnx", "q4")]
QUANTIZED += [("onnx", "w8a8"), ("onnx", "turbo")]
ONE_LAYOUT = {"scales-zero", "zero-points", "nibbles", "kv-scales", "prefill-scales-zero"}


def cases():
    """(format, profile, fault): all at f32, some at the others; what takes too long together is marked."""
    for format in FORMATS:
        for name in FAULTS:
            marks = () if name in QUICK[format] else pytest.mark.slow
            yield pytest.param(format, "f32", name, id=f"{format}-f32-{name}", marks=marks)
    for format, profile in QUANTIZED:
        for name in COARSE:
            marks = () if name in ONE_LAYOUT and profile in ("q4", "q5", "turbo") else pytest.mark.slow
            yield pytest.param(format, profile, name, id=f"{format}-{profile}-{name}", marks=marks)


@pytest.fixture(scope="module")
def right(golden, tmp_path_factory):
    """Right exports, each made once."""
    original = describe(golden)

    @lru_cache
    def made(format: str, profile: str) -> Setting:
        out = tmp_path_factory.mktemp("right") / f"{profile}.{format}"
        return settled(format, original, lambda: pipeline.export(golden, format, profile, out, verify=False, threads=1))

    return made


@pytest.mark.parametrize(("format", "profile", "name"), list(cases()))
def test_caught(right, tmp_path, format, profile, name):
    found = attempt(FAULTS[name], right(format, profile), tmp_path / "faulty", threads=1)
    if found is None:  # this export has no place for it: see the next test
        return
    assert found.stage in FAULTS[name].stages, (found.stage, found.why)


# In format, fault: there is no such thing in it. Everything else must have been planted at f32.
NOWHERE = {
    "gguf": {"mask-fact", "head-tied-by-fact", "pixels-256", "pixels-unsigned"}
    | {f"{part}-gelu-{kind}" for part in ("tower", "decoder", "projector") for kind in ("exact", "quick")},
    "onnx": {"vocabulary-stale", "pixels-clip", "projector-gelu-running", "region-gelu-running"},
}
# No tiny checkpoint has a gated decoder, and floats have no scales.
UNPLANTED = {"gate-up", "scales-zero", "scales-shifted", "scale-of-a-row", "zero-points", "nibbles"}
UNPLANTED |= {"prefill-scales-zero", "kv-scales"}


@pytest.mark.parametrize("format", FORMATS)
def test_each_fault_has_a_place(right, format):
    """By declared facts alone; that bytes change is seen by test_caught, which would find nothing caught."""
    target = right(format, "f32").target
    missing = {name for name, fault in FAULTS.items() if not fault.applies(target)}
    assert missing <= UNPLANTED | NOWHERE[format]


@pytest.mark.parametrize(
    ("format", "profile", "names"),
    [
        ("gguf", "q5", {"scales-zero", "scales-shifted", "scale-of-a-row", "zero-points", "nibbles"}),
        ("onnx", "q4", {"scales-zero", "scales-shifted", "scale-of-a-row", "zero-points", "nibbles"}),
        ("onnx", "turbo", {"scales-zero", "zero-points", "prefill-scales-zero", "kv-scales"}),
    ],
)
def test_integers_have_scales(right, format, profile, names):
    target = right(format, profile).target
    assert names <= {name for name, fault in FAULTS.items() if fault.applies(target)}


def test_the_catalogue():
    """Names are those of its keys, stages are the gate's, every kind of place is used, and there are enough."""
    assert len(FAULTS) >= 100
    for name, fault in FAULTS.items():
        assert fault.name == name
        assert re.fullmatch(r"[a-z0-9-]+", name)
        assert set(fault.stages) <= {*STAGES, REFUSED}
        assert fault.stages
    assert {type(fault.plant) for fault in FAULTS.values()} == {Given, Written, Running, Shared}


def test_export_itself_refuses(golden, tmp_path, monkeypatch):
    """What the gate finds inside `export` is an error that names the stage, and nothing is left behind."""
    fault = FAULTS["decoder-q-k"]
    assert isinstance(fault.plant, Given)
    change, job = fault.plant.change, pipeline.ExportJob
    monkeypatch.setattr(pipeline, "ExportJob", lambda **given: change(job(**given)))
    with pytest.raises(VerificationError, match="at the stage 'weights'"):
        pipeline.export(golden, "gguf", "f32", tmp_path / "x", threads=1)
    assert not Path(tmp_path / "x").exists()
