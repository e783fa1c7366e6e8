"""One contract for every family, format, flavour and profile: exported, opened, asked, as near as its profile says."""

from pathlib import Path

import numpy as np
import pytest

import vlmedge
from vlmedge.exporters import EXPORTERS
from vlmedge.families import FAMILIES
from vlmedge.parity.metrics import difference
from vlmedge.quant_profiles import load_profile, profiles_for

DATA = Path(__file__).parent / "data"
# One tiny checkpoint per family, with upstream's tensor names.
TINY = {"moondream2": DATA / "moondream2/tiny-mha"}
WAYS = [
    pytest.param(format_, flavour, profile, id="-".join(filter(None, (format_, flavour, profile))))
    for format_ in EXPORTERS
    for flavour in EXPORTERS[format_].flavours
    for profile in profiles_for(format_)
]


def test_every_family_has_a_tiny_checkpoint():
    assert set(TINY) == set(FAMILIES)


@pytest.fixture(scope="module", params=TINY)
def original(request):
    folder = TINY[request.param]
    with vlmedge.load(folder, threads=1) as model:
        yield folder, model


@pytest.mark.parametrize(("format_", "flavour", "profile"), WAYS)
def test_plan_counts_every_tensor(format_, flavour, profile):
    for folder in TINY.values():
        plan = vlmedge.plan(folder, format_, profile, flavour=flavour)
        assert {name.partition("#")[0] for name in plan.encodings} == set(plan.shapes)
        assert all(encoding.bytes > 0 for encoding in plan.encodings.values())


@pytest.mark.parametrize("format_", EXPORTERS)
def test_every_format_has_its_default_profile(format_):
    exporter = EXPORTERS[format_]
    assert exporter.format == format_
    assert exporter.default_profile in profiles_for(format_)
    assert len(set(exporter.flavours)) == len(exporter.flavours) >= 1


@pytest.mark.parametrize("format_", EXPORTERS)
@pytest.mark.parametrize("wanted", ["f32", "f16", "int8"])
def test_every_format_knows_how_it_keeps_keys_and_values(format_, wanted):
    for flavour in EXPORTERS[format_].flavours:
        kept = EXPORTERS[format_].kv_cache(wanted, flavour)
        assert EXPORTERS[format_].kv_cache(kept, flavour) == kept, "what it keeps, it keeps when asked for it"


@pytest.mark.slow
@pytest.mark.parametrize(("format_", "flavour", "profile"), WAYS)
def test_export_opens_and_is_near_the_original(original, format_, flavour, profile, tmp_path):
    folder, reference = original
    out = tmp_path / "out"
    bundle = vlmedge.export(folder, format_, profile, out, flavour=flavour, verify=False, threads=1)
    planned = vlmedge.plan(folder, format_, profile, flavour=flavour)
    manifest, rules = bundle.manifest, load_profile(profile)
    assert sum(c.bytes for c in manifest.components) == planned.bytes
    assert (manifest.format, manifest.flavour) == (format_, flavour)
    assert manifest.profile.kv_cache == EXPORTERS[format_].kv_cache(rules.kv_cache, flavour)
    picture = np.zeros((200, 300, 3), np.uint8)
    picture[50:150, 60:200] = (200, 30, 90)
    with vlmedge.load(bundle.path, threads=1) as model:
        ours, theirs = (m.stages([picture], [1, 2, 3]) for m in (model, reference))
        answer = model.caption(picture, "short", max_tokens=2)
    assert np.array_equal(ours["pixels"], theirs["pixels"])
    near = next(limits for limits in rules.limits_for(format_) if limits.against == "original")
    for stage in ("features", "projected"):
        assert difference(ours[stage], theirs[stage])[0] < getattr(near, stage), stage
    assert difference(ours["logits"][-1], theirs["logits"][-1])[0] < near.logits
    assert np.isfinite(ours["logits"]).all()
    assert answer.image_tokens == model.spec.image_tokens
