"""One contract for every family, format and profile: exported, opened, asked, as near as its profile says."""

from pathlib import Path

import numpy as np
import pytest

import vlmedge
from vlmedge.exporters import EXPORTERS
from vlmedge.families import FAMILIES
from vlmedge.parity.stages import difference
from vlmedge.quant_profiles import load_profile, profile_names

DATA = Path(__file__).parent / "data"
# One tiny checkpoint per family, with upstream's tensor names.
TINY = {"moondream2": DATA / "moondream2/tiny-mha"}


def test_every_family_has_a_tiny_checkpoint():
    assert set(TINY) == set(FAMILIES)


@pytest.fixture(scope="module", params=TINY)
def original(request):
    folder = TINY[request.param]
    with vlmedge.load(folder, threads=1) as model:
        yield folder, model


@pytest.mark.parametrize("profile", profile_names())
@pytest.mark.parametrize("format_", EXPORTERS)
def test_plan_counts_every_tensor(format_, profile):
    for folder in TINY.values():
        plan = vlmedge.plan(folder, format_, profile)
        assert {name.partition("#")[0] for name in plan.encodings} == set(plan.shapes)
        assert all(encoding.bytes > 0 for encoding in plan.encodings.values())


def test_every_profile_says_how_near_it_comes():
    for name in profile_names():
        assert set(load_profile(name).tolerance) == {"features", "projected", "logits", "regions"}, name


@pytest.mark.slow
@pytest.mark.parametrize("profile", profile_names())
@pytest.mark.parametrize("format_", EXPORTERS)
def test_export_opens_and_is_near_the_original(original, format_, profile, tmp_path):
    folder, reference = original
    bundle = vlmedge.export(folder, format_, profile, tmp_path / "out", verify=False, threads=1)
    planned = vlmedge.plan(folder, format_, profile)
    assert sum(c.bytes for c in bundle.manifest.components) == planned.bytes
    picture = np.zeros((200, 300, 3), np.uint8)
    picture[50:150, 60:200] = (200, 30, 90)
    with vlmedge.load(bundle.path, threads=1) as model:
        ours, theirs = (m.stages([picture], [1, 2, 3]) for m in (model, reference))
        answer = model.caption(picture, "short", max_tokens=2)
    assert np.array_equal(ours["pixels"], theirs["pixels"])
    near = load_profile(profile).tolerance
    for stage in ("features", "projected"):
        assert difference(ours[stage], theirs[stage])[0] < near[stage], stage
    assert difference(ours["logits"][-1], theirs["logits"][-1])[0] < near["logits"]
    assert np.isfinite(ours["logits"]).all()
    assert answer.image_tokens == model.spec.image_tokens
