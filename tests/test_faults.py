"""The gate against every fault of the catalogue: each is caught, at the stage where it bites."""

from __future__ import annotations

import itertools
import re
from functools import lru_cache
from pathlib import Path

import pytest

from vlmedge import pipeline
from vlmedge.errors import VerificationError
from vlmedge.exporters import ExportJob
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
QUANTIZED = {
    ("gguf", "q8"): ("scales-shifted", "tower-q-k", "hidden-normed"),
    ("gguf", "q4"): ("scale-of-a-row", "nibbles", "decoder-bias", "bos-dropped"),
    ("gguf", "q5"): ("scales-zero", "zero-points"),
    ("onnx", "q8"): ("scales-zero", "height-first"),
    ("onnx", "q4"): ("scale-of-a-row", "zero-points", "nibbles", "causal-picture", "decoder-eps-1e-12"),
    ("onnx", "w8a8"): ("scales-shifted", "data-late", "no-global", "bins-flipped"),
    ("onnx", "turbo"): ("zero-points", "prefill-scales-zero", "decoder-last-layer", "bicubic", "causal-picture"),
}
# There is no such thing in a format, and, below, in a tiny checkpoint's floats.
NOWHERE = {
    "gguf": {"mask-fact", "head-tied-by-fact", "pixels-256", "pixels-unsigned", "tower-gelu-exact", "tower-gelu-quick"}
    | {"decoder-gelu-exact", "projector-gelu-exact"},
    "onnx": {"vocabulary-stale", "pre-tokenizer-in-files", "projector-gelu-running", "region-gelu-running"},
}
UNPLANTED = {"gate-up", "scales-zero", "scales-shifted", "scale-of-a-row", "zero-points", "nibbles"}
UNPLANTED |= {"prefill-scales-zero", "kv-scales"}


def cases():
    """(format, profile, fault): all at f32, some at the others; what takes too long together is marked.

    Each at f32 in one format, by turns: docs/faults.md has all of them.
    """
    for number, (name, format) in enumerate(itertools.product(FAULTS, FORMATS)):
        listed = [f for f in FORMATS if name in QUICK[f]]
        possible = [f for f in FORMATS if name not in NOWHERE[f]]
        homes = listed or [possible[number // 2 % len(possible)]]
        if name not in UNPLANTED and format in homes:
            marks = () if name in QUICK[format] else pytest.mark.slow
            yield pytest.param(format, "f32", name, id=f"{format}-f32-{name}", marks=marks)
    for (format, profile), names in QUANTIZED.items():
        for name in names:
            marks = () if profile in ("q4", "q5", "turbo") else pytest.mark.slow
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
    assert found is not None, "the export has no place for it"
    assert found.stage in FAULTS[name].stages, (found.stage, found.why)


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
    change = fault.plant.change
    monkeypatch.setattr(pipeline, "ExportJob", lambda **given: change(ExportJob(**given)))
    with pytest.raises(VerificationError, match="at the stage 'weights'"):
        pipeline.export(golden, "gguf", "f32", tmp_path / "x", threads=1)
    assert not Path(tmp_path / "x").exists()
