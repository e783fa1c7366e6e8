"""Medians, percentiles and how sure they are: processes are drawn again, then the samples within each.

Percentiles are interpolated linearly between the sorted samples (type 7 of Hyndman and Fan 1996, NumPy's default).
Samples of one process share its memory layout, threads and moment, so they spread less than processes do: an interval
from samples alone would be too narrow (Kalibera and Jones 2013, "Rigorous benchmarking in reasonable time").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Final, TypeAlias

import numpy as np

DRAWS: Final = 1000  # Efron and Tibshirani 1993: at least 1000 for the ends of a 95 % interval
SEED: Final = 20250621
TAIL: Final = 0.025  # on each side of a 95 % interval
_MOST = 240  # samples of an ask that are drawn from, in all rounds: of more an even choice, the interval is a bit wider

F64: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
I64: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
# Of each ask, of each round (a fresh process): its samples.
Samples: TypeAlias = Sequence[Sequence[Sequence[float]]]


@dataclass(frozen=True, slots=True)
class Figures:
    """What samples say. Of several asks `median` and its interval are means of the asks' medians, the rest is pooled.

    `low` and `high`: the 95 % interval of `median`, None where one sample tells none. `rounds`: processes that have
    samples; from a single one the interval knows nothing of how processes differ. `stdev`: of the sample, 0 of one.
    """

    n: int
    rounds: int
    median: float
    low: float | None
    high: float | None
    p90: float
    p95: float
    p99: float
    mean: float
    stdev: float
    least: float
    most: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """How a median compares with another's, and its 95 % interval; None ends where one side has a single sample."""

    value: float
    low: float | None
    high: float | None


def figures(samples: Samples, *, interval: bool = True) -> Figures | None:
    """The figures of all samples; None where there are none. Seeded: the same samples give the same interval."""
    asks = _present(samples)
    if not asks:
        return None
    pooled = np.array([v for rounds in asks for values in rounds for v in values], np.float64)
    p90, p95, p99 = (float(v) for v in np.quantile(pooled, (0.9, 0.95, 0.99)))
    low, high = _ends(_draws(asks, 0), _things(asks)) if interval and _tells(asks) else (None, None)
    spread = float(pooled.std(ddof=1)) if len(pooled) > 1 else 0.0
    return Figures(
        len(pooled), _rounds(asks), _median(asks), low, high, p90, p95, p99,
        float(pooled.mean()), spread, float(pooled.min()), float(pooled.max()),
    )  # fmt: skip


def ratio(ours: Samples, base: Samples) -> Ratio | None:
    """Our median over the base's, over the asks that both have, each side drawn by itself.

    None where no ask is in both (they are matched by place), or the base's median is 0.
    """
    both = [(a, b) for a, b in zip(ours, base, strict=True) if any(a) and any(b)]
    top, bottom = _present([a for a, _ in both]), _present([b for _, b in both])
    below = _median(bottom) if bottom else 0.0
    if not below:
        return None
    value = _median(top) / below
    if not (_tells(top) and _tells(bottom)):
        return Ratio(value, None, None)
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = _draws(top, 1) / _draws(bottom, 2)
    return Ratio(value, *_ends(drawn, min(_things(top), _things(bottom))))


def _present(samples: Samples) -> list[list[list[float]]]:
    """Asks that have samples; every ask keeps its empty rounds, so that rounds mean the same in all."""
    return [[list(values) for values in rounds] for rounds in samples if any(len(values) for values in rounds)]


def _rounds(asks: list[list[list[float]]]) -> int:
    return sum(any(rounds[i] for rounds in asks if i < len(rounds)) for i in range(max(map(len, asks))))


def _tells(asks: list[list[list[float]]]) -> bool:
    return bool(asks) and _things(asks) > 1


def _median(asks: list[list[list[float]]]) -> float:
    return float(np.mean([np.median([v for values in rounds for v in values]) for rounds in asks]))


def _ends(drawn: F64, count: int) -> tuple[float | None, float | None]:
    """The ends of the interval from draws of `count` independent things.

    Percentiles of draws are too narrow where few things are drawn: the tails are those at which a normal interval would
    be as wide as Student's (the expanded percentile interval, Hesterberg 2014, arXiv:1411.5279). Of three processes it
    spans about what the processes span.
    """
    found = drawn[np.isfinite(drawn)]
    if not len(found) or count < 2:
        return None, None
    tail = NormalDist().cdf(-math.sqrt(count / (count - 1)) * _student(count - 1))
    low, high = np.quantile(found, (tail, 1 - tail))
    return float(low), float(high)


def _student(freedom: int) -> float:
    """Student's t at `TAIL`, by Abramowitz and Stegun 26.7.5: a tenth too small at 1, which is large enough anyway."""
    z, f = NormalDist().inv_cdf(1 - TAIL), float(freedom)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / f + second / f**2 + third / f**3


def _things(asks: list[list[list[float]]]) -> int:
    """What is independent: processes; of one process, the samples of the ask that has the fewest."""
    rounds = _rounds(asks)
    return rounds if rounds > 1 else min(sum(map(len, found)) for found in asks)


def _draws(asks: list[list[list[float]]], side: int) -> F64:
    """Means over asks of the medians of what was drawn, [draws]; NaN where an ask has nothing in a draw."""
    count = max(map(len, asks))
    asks = [[_thinned(values, max(8, _MOST // count)) for values in rounds] for rounds in asks]
    sizes = tuple(tuple(len(rounds[i]) if i < len(rounds) else 0 for i in range(count)) for rounds in asks)
    kept = [i for i in range(count) if any(row[i] for row in sizes)]
    sizes = tuple(tuple(row[i] for i in kept) for row in sizes)
    total = np.zeros(DRAWS)
    for rounds, places in zip(asks, _places(sizes, side), strict=True):
        flat = np.array([v for values in rounds for v in values] + [np.inf])  # the last stands for "nothing"
        total += _medians(flat[places])
    return total / len(asks)


def _thinned(values: list[float], most: int) -> list[float]:
    """No more than `most` of the samples, evenly by their size, so that their median stays."""
    if len(values) <= most:
        return values
    return [float(v) for v in np.quantile(values, (np.arange(most) + 0.5) / most)]


@lru_cache(maxsize=16)  # most stages have the same numbers of samples
def _places(sizes: tuple[tuple[int, ...], ...], side: int) -> tuple[I64, ...]:
    """Of each ask: which samples were drawn, [draws, rounds x the most samples of a round].

    Rounds are drawn once for all asks, whose samples come from the same processes; then, in every drawn round, as many
    samples as it has. Places without one point behind the last sample.
    """
    rng = np.random.default_rng((SEED, side))
    count = len(sizes[0])
    drawn = rng.integers(count, size=(DRAWS, count))
    found = []
    for row in sizes:
        held, starts = np.array(row), np.concatenate(([0], np.cumsum(row)[:-1]))
        most = max(row)
        within = (rng.random((DRAWS, count, most)) * held[drawn][..., None]).astype(np.int64)
        places = np.where(np.arange(most) < held[drawn][..., None], starts[drawn][..., None] + within, sum(row))
        found.append(places.reshape(DRAWS, count * most))
    return tuple(found)


def _medians(drawn: F64) -> F64:
    """The median of each row's finite numbers; NaN where there are none."""
    if np.isfinite(drawn).all():
        return np.asarray(np.median(drawn, axis=1), np.float64)
    ordered = np.sort(drawn, axis=1)
    count = np.isfinite(ordered).sum(axis=1)
    rows = np.arange(len(ordered))
    middle = (ordered[rows, np.maximum(count - 1, 0) // 2] + ordered[rows, count // 2]) / 2
    found: F64 = np.where(count > 0, middle, np.nan)
    return found
