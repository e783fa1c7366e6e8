"""What no shipped limits may let pass: answers that have nothing to do with the original's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vlmedge.exporters import EXPORTERS
from vlmedge.loading import describe, open_original
from vlmedge.parity.compare import compare
from vlmedge.parity.gates import DEFAULT
from vlmedge.parity.judge import judge
from vlmedge.parity.trace import needed_context, trace
from vlmedge.quant_profiles import load_profile, profiles_for

TINY = Path(__file__).parent / "data/moondream2/tiny-mha"
LIMITS = [
    pytest.param(limits, id=f"{format_}-{name}-{limits.against}")
    for format_ in EXPORTERS
    for name in profiles_for(format_)
    for limits in load_profile(name).limits_for(format_)
] + [pytest.param(limits, id=f"none-{against}") for against, limits in DEFAULT.items()]
STORED = [p for p in LIMITS if p.values[0].against == "stored"]


@pytest.fixture(scope="module")
def found():
    return describe(TINY)


@pytest.fixture(scope="module")
def record(found):
    with open_original(found, threads=1, context=needed_context(found.spec)) as model:
        return trace(model).record


@pytest.fixture(scope="module")
def judged(found, record):
    return judge(record, found.spec, found.tensors, same_inputs=True, threads=1)


@pytest.fixture
def failing(found, record, judged):
    """The stages that fail with some of the decoder's logits replaced: `failing(limits, change)`."""

    def run(limits, change, *, words=None):
        """`words`: at one step only, the most decided at which a word is chosen (or something fed back for a box)."""
        steps = [i for i, f in enumerate(record.forwards) if f.decodes and f.chooses is words]
        chosen = range(len(record.forwards))
        if words is not None:
            chosen = [max(steps, key=lambda i: record.forwards[i].logits.std())]
        forwards = [replace(f, logits=change(f.logits)) if i in chosen else f for i, f in enumerate(record.forwards)]
        stages = compare(replace(record, forwards=forwards), judged, found.spec, limits.against, limits).stages
        return {s.stage for s in stages if s.outcome == "failed"}

    return run


def unrelated(logits):
    return np.random.default_rng(5).permutation(logits)


@pytest.mark.parametrize("limits", LIMITS)
def test_answers_that_are_none(failing, limits):
    assert failing(limits, lambda a: a) == set()
    assert failing(limits, np.zeros_like) >= {"logits", "tokens"}
    assert failing(limits, unrelated) >= {"logits", "tokens"}
    assert failing(limits, np.negative) >= {"logits", "tokens"}
    assert failing(limits, lambda a: a[:-1]) >= {"logits", "tokens"}, "another vocabulary is a failed stage, no error"
    assert failing(limits, lambda a: np.full_like(a, np.nan)) >= {"logits", "tokens"}


@pytest.mark.parametrize("limits", LIMITS)
def test_what_all_logits_have_in_common_means_nothing(failing, limits):
    """Neither is it a difference, nor may it hide one."""
    assert failing(limits, lambda a: a + 50) == set()
    assert failing(limits, lambda a: unrelated(a) + 1000) >= {"logits", "tokens"}


@pytest.mark.parametrize("limits", STORED)
def test_a_single_wrong_step(failing, limits):
    """Among some thirty right ones; against the original, where weights of few bits turn choices, none is judged."""
    for change in (lambda a: np.roll(a, 7), np.negative):
        assert failing(limits, change, words=True) == {"tokens"}
        assert failing(limits, change, words=False) == {"boxes"}
