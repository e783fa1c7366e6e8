"""One contract for every family, format and profile: exported, opened, asked, near the original as its bits allow."""

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
# Largest relative RMS of the projected embeddings on random weights, by the fewest bits that a profile gives a weight.
NEAR = {32: 5e-3, 16: 2e-2, 8: 5e-2, 6: 5e-2, 5: 5e-2, 4: 5e-2, 3: 5e-2}


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
    bits = min(rule.scheme.bits for rule in load_profile(profile).rules)
    assert difference(ours["projected"], theirs["projected"])[0] < NEAR[bits]
    assert np.isfinite(ours["logits"]).all()
    assert answer.image_tokens == model.spec.image_tokens
