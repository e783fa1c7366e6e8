"""The original read layer by layer gives what the whole original gives; an export that parts from it is caught."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vlmedge.loading import describe, open_original
from vlmedge.parity.original import judge
from vlmedge.parity.stages import compare, difference
from vlmedge.parity.trace import TOKENS, needed_context, trace

TINY = Path(__file__).parent / "data/moondream2/tiny-mha"


@pytest.fixture(scope="module")
def found():
    return describe(TINY)


@pytest.fixture(scope="module")
def ours(found):
    with open_original(found, threads=1, context=needed_context(found.spec)) as model:
        return trace(model)


@pytest.fixture(scope="module")
def original(found, ours):
    return judge(found.spec, found.tensors, ours, threads=1)


def test_streamed_equals_whole(ours, original):
    for name in ("pixels", "features", "local"):
        assert difference(getattr(original, name), getattr(ours, name))[0] < 1e-6, name
    for judgement, reading in ((original.small, ours.small), (original.stitched, ours.stitched)):
        assert difference(judgement.projected, reading.projected)[0] < 1e-5
        assert difference(judgement.logits, reading.logits)[0] < 1e-5
        assert judgement.choices == reading.tokens
        assert len(reading.tokens) <= TOKENS


def test_what_agrees_agrees(ours, original):
    result = compare(ours, original)
    assert [s.stage for s in result.stages] == ["pixels", "features", "projected", "logits"]
    assert result.first_divergence is None
    assert result.failing(dict.fromkeys(("features", "projected", "logits"), 1e-4)) is None


def test_the_first_stage_that_parts_is_named(ours, original):
    rng = np.random.default_rng(0)
    worse = replace(ours, local=ours.local + 0.1 * rng.standard_normal(ours.local.shape).astype(np.float32))
    failing = compare(worse, original).failing({"features": 1e-2, "projected": 1e-2, "logits": 1e-2})
    assert failing is not None
    assert failing.stage == "features"
    assert failing.relative_rms > 0.05


def test_numbers_that_are_none_fail(ours, original):
    broken = replace(ours, small=replace(ours.small, logits=np.full_like(ours.small.logits, np.nan)))
    failing = compare(broken, original).failing({"logits": 1.0})
    assert failing is not None
    assert failing.stage == "logits"


def test_another_token_is_found_and_near_ties_are_told_apart(ours, original):
    other = list(ours.small.tokens)
    other[0] = (other[0] + 1) % 512
    changed = replace(ours, small=replace(ours.small, tokens=tuple(other)))
    result = compare(changed, original)
    assert (result.first_divergence, result.near_tie) == (0, False)
    noisy = replace(changed, small=replace(changed.small, logits=changed.small.logits + 100))
    assert compare(noisy, original).near_tie
