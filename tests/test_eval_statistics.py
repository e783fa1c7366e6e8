"""Intervals that hold the truth as often as they say, and p-values worked out by hand."""

import numpy as np
import pytest

from vlmedge.evaluation.row import Row
from vlmedge.evaluation.statistics import difference, estimate, mcnemar
from vlmedge.evaluation.summary import pair


def sums(right, asked):
    return {str(i): (float(r), float(n)) for i, (r, n) in enumerate(zip(right, asked, strict=True))}


def test_a_mean_is_over_questions_not_over_pictures():
    found = estimate(sums([1, 0, 3], [1, 2, 3]))
    assert found is not None
    assert (found.value, found.count) == (pytest.approx(4 / 6), 6)
    assert found.low < found.value < found.high
    assert estimate(sums([1, 0, 3], [1, 2, 3])) == found  # seeded


def test_nothing_and_one_picture():
    assert estimate({}) is None
    assert estimate(sums([0], [0])) is None
    one = estimate(sums([2], [3]))
    assert one is not None
    assert (one.low, one.high) == (None, None)


def test_all_right_is_not_certainty():
    found = estimate(sums([4] * 100, [4] * 100), share=True)
    assert found is not None
    assert (found.low, found.high) == (pytest.approx(0.9638, abs=1e-4), 1.0)  # Clopper and Pearson, 100 of 100
    none = estimate(sums([0] * 100, [4] * 100), share=True)
    assert none is not None
    assert (none.low, none.high) == (0.0, pytest.approx(1 - 0.9638, abs=1e-4))


def test_an_interval_holds_the_truth_19_times_of_20():
    """Questions of a picture go wrong together: the truth is 0.8, each picture's own rate varies around it."""
    rng = np.random.default_rng(1)
    held = naive = 0
    for _ in range(200):
        rates = rng.beta(1.6, 0.4, 60)
        right = rng.binomial(10, rates)
        found = estimate(sums(right, [10] * 60))
        assert found is not None
        held += found.low <= 0.8 <= found.high
        margin = 1.96 * np.sqrt(found.value * (1 - found.value) / 600)  # as if the questions were independent
        naive += abs(found.value - 0.8) <= margin
    assert 180 <= held <= 198
    assert naive < 160


def test_pairs_are_drawn_together():
    rng = np.random.default_rng(2)
    base = rng.binomial(10, 0.8, 100)
    ours = base - (rng.random(100) < 0.1)
    found = difference(sums(ours, [10] * 100), sums(base, [10] * 100))
    assert found is not None
    assert found.value == pytest.approx((ours.sum() - base.sum()) / 1000)
    assert found.high < 0  # 1 point of loss is seen, though each mean is known to about 2.5 points only
    apart = estimate(sums(base, [10] * 100))
    assert apart is not None
    assert apart.high - apart.low > 2 * (found.high - found.low)


def test_no_difference_includes_zero():
    same = difference(sums([1, 2, 3], [3, 3, 3]), sums([1, 2, 3], [3, 3, 3]))
    assert same is not None
    assert (same.value, same.low, same.high, same.includes_zero) == (0, 0, 0, True)
    assert difference(sums([1], [1]), {"other": (1.0, 1.0)}) is None


@pytest.mark.parametrize(
    ("lost", "won", "p"),
    [
        (0, 0, 1.0),
        (3, 3, 1.0),
        (1, 7, 2 * (1 + 8) / 256),
        (7, 1, 2 * (1 + 8) / 256),
        (0, 6, 2 / 64),
        (2, 8, 2 * (1 + 10 + 45) / 1024),
    ],
)
def test_mcnemar(lost, won, p):
    assert mcnemar(lost, won) == pytest.approx(p)


def test_mcnemar_of_many():
    assert mcnemar(5000, 5200) == pytest.approx(0.0488, abs=1e-3)  # the normal approximation: z = 1.970 corrected
    assert mcnemar(0, 20000) == 0


# Of each picture: how many of its 10 questions the base has right, and the model.
@pytest.mark.parametrize(
    ("pictures", "verdict"),
    [
        ([(10, 9)] * 2, "no clear difference (p is 0.5)"),  # every draw is alike: the interval is -10 % to -10 %
        ([(9, 10)] * 5, "no clear difference (p is 0.062)"),
        ([(9, 10)] * 6, "better"),
        ([(10, 9)] * 30, "worse"),
        ([(10, 0)] + [(10, 10)] * 30, "no clear difference (the interval includes 0)"),  # one odd picture, p is 0.002
        ([(10, 9), (9, 10)] * 10, "no clear difference (the interval includes 0)"),
        ([(9, 9)] * 2, "the same questions are right"),
        ([(10, 1)], "one picture tells nothing"),
        ([], "no question was answered by both"),
    ],
)
def test_a_verdict_needs_the_interval_and_the_p_value(pictures, verdict):
    base, ours = (dict(enumerate(rows)) for rows in zip(*pictures, strict=True)) if pictures else ({}, {})
    assert pair("ours", answers(ours), "base", answers(base)).verdict == verdict


def answers(right):
    return {
        f"{i}/{n}": Row(f"{i}/{n}", str(i), "query", "query", n < count)
        for i, count in right.items()
        for n in range(10)
    }
