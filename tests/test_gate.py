"""No false alarms: every export of random models passes verification, within limits that every profile declares."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import vlmedge
from vlmedge.exporters import EXPORTERS
from vlmedge.loading import describe
from vlmedge.parity.verify import verify
from vlmedge.quant_profiles import load_profile, profile_names, profiles_for

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SEEDS = (10, 11)  # benchmarks/gate.py, from which the limits come, draws those below
WAYS = [
    pytest.param(format_, flavour, profile, id="-".join(filter(None, (format_, flavour, profile))))
    for format_ in EXPORTERS
    for flavour in EXPORTERS[format_].flavours
    for profile in profiles_for(format_)
]


@pytest.fixture(scope="module")
def gate():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("gate")


@pytest.fixture(scope="module", params=SEEDS)
def drawn(request, gate, tmp_path_factory):
    """A random model and a picture for it."""
    folder = gate.draw(tmp_path_factory.mktemp("drawn") / "tiny", "tiny", request.param)
    return folder, {"text": gate.pictures(request.param, 112)["text"]}


@pytest.mark.slow
@pytest.mark.parametrize(("format_", "flavour", "profile"), WAYS)
def test_every_export_of_random_models_passes(drawn, format_, flavour, profile, tmp_path):
    folder, pictures = drawn
    out = tmp_path / "out"
    bundle = vlmedge.export(folder, format_, profile, out, flavour=flavour, verify=False, threads=1)
    report = verify(bundle.path, folder, pictures, threads=1)
    assert [f"{s.stage} ({s.against}): {s.why}" for s in report.stages if s.outcome == "failed"] == []
    assert report.passed
    assert {s.against for s in report.stages} - {None} == {"stored", "original"}
    assert all(s.limit is not None for s in report.stages if s.against), "every comparison is judged"


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_has_limits_and_says_why(name):
    profile = load_profile(name)
    for format_ in profile.formats or tuple(EXPORTERS):
        found = {limits.against: limits for limits in profile.limits_for(format_)}
        assert set(found) == {"stored", "original"}, format_
        for limits in found.values():
            assert limits.reason.endswith("."), "a sentence"
            assert len(limits.reason) > 40, "a reason"
        values = [[limits.features, limits.projected, limits.logits, limits.regions] for limits in found.values()]
        assert all(value for row in values for value in row), "no stage goes unjudged"
        for stage in ("features", "projected", "logits", "regions"):
            assert getattr(found["stored"], stage) <= getattr(found["original"], stage), stage


@pytest.mark.parametrize("format_", EXPORTERS)
def test_exact_runtimes_are_held_to_exact_numbers(format_):
    """ONNX Runtime adds float32 up; only ggml's f16 tables excuse more."""
    found = {limits.against: limits for limits in load_profile("f32").limits_for(format_)}
    assert found["original"].logits <= (1e-2 if format_ == "gguf" else 1e-4)
    assert found["stored"].projected == found["stored"].regions == 1e-5, "no table has a part in these"


def test_drawn_models_are_new_and_scaled_as_their_pattern(gate, tmp_path):
    one, two = (describe(gate.draw(tmp_path / str(seed), "small", seed)) for seed in (1, 2))
    pattern = describe(gate.PATTERNS["moondream2"])
    assert one.spec.tensors() == pattern.spec.tensors()
    for name in ("decoder.layers.2.attn.k.weight", "vision.layers.9.mlp.up.weight", "region.size_decoder.down.weight"):
        ours, other, wanted = (d.tensors[name].read() for d in (one, two, pattern))
        assert ours.std() == pytest.approx(wanted.std(), rel=0.05)
        assert abs((ours * other).mean()) < 0.1 * wanted.var(), "drawn anew"
    norm = one.tensors["decoder.norm.weight"].read()
    assert norm.mean() == pytest.approx(1, abs=0.1)


def test_pictures_are_of_three_kinds_and_many_sizes(gate):
    seen = [gate.pictures(seed, 112) for seed in range(5)]
    assert {tuple(pictures) for pictures in seen} == {("smooth", "noise", "text")}
    shapes = [picture.shape[:2] for pictures in seen for picture in pictures.values()]
    assert len(set(shapes)) == len(shapes)
    assert min(map(min, shapes)) < 112 < max(map(max, shapes)), "one crop, and several"


@pytest.mark.slow
def test_the_command_tells_of_every_stage_and_type():
    words = ["--seeds", "1", "--models", "tiny", "--formats", "gguf", "--profiles", "q8", "--processes", "1"]
    command = [sys.executable, BENCHMARKS / "gate.py", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("1 exports verified, 0 failed\n")
    assert "| q8 | gguf | boxes | stored |" in done.stdout
    assert "gguf Q8_0: 0." in done.stdout
