"""How sure a mean over questions is: bootstrap intervals over pictures, paired differences, flips and their p-value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

DRAWS = 2000  # Efron and Tibshirani 1993: at least 1000 for the ends of a 95 % interval
SEED = 20240907
TAIL = 0.025  # on each side of a 95 % interval
_BLOCK = 4_000_000  # numbers held at once

F64: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
# Of each picture: the sum of a score over its questions, and what it is divided by.
Sums: TypeAlias = Mapping[str, tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its 95 % interval; `low` and `high` are None where one picture or none was asked about.

    `count` is what the mean divides by: questions, or things to find.
    """

    value: float
    low: float | None
    high: float | None
    count: float

    @property
    def includes_zero(self) -> bool:
        """Can the truth be 0, as far as the interval tells? Yes where there is no interval."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high


def estimate(sums: Sums, *, share: bool = False) -> Estimate | None:
    """The mean (sum of sums over sum of counts) with its percentile interval; None where nothing is counted.

    Pictures are drawn with replacement, each with all its questions, whose answers depend on each other: the cluster
    bootstrap (Davison and Hinkley 1997). Seeded: the same sums give the same interval. Of a `share` that
    is 0 or 1 in every picture all draws are alike; the interval is then that of as many independent pictures
    (Clopper and Pearson 1934).
    """
    counted = {picture: pair for picture, pair in sums.items() if pair[1] > 0}
    if not counted:
        return None
    pairs = np.array(list(counted.values()), np.float64)
    total, count = pairs.sum(axis=0)
    value = float(total / count)
    if len(pairs) < 2:
        return Estimate(value, None, None, float(count))
    if share and value in (0.0, 1.0):
        edge = TAIL ** (1 / len(pairs))
        low, high = (edge, 1.0) if value else (0.0, 1 - edge)
    else:
        low, high = _ends(_ratios(pairs))
    return Estimate(value, low, high, float(count))


def difference(ours: Sums, base: Sums) -> Estimate | None:
    """Our mean minus the base's over the pictures of both, with its interval: both are drawn together, pair by pair."""
    both = [p for p in base if p in ours and base[p][1] > 0 and ours[p][1] > 0]
    if not both:
        return None
    pairs = np.array([(*ours[p], *base[p]) for p in both], np.float64)
    sums = pairs.sum(axis=0)
    value = float(sums[0] / sums[1] - sums[2] / sums[3])
    if len(pairs) < 2:
        return Estimate(value, None, None, float(sums[3]))
    drawn = _drawn(pairs)
    low, high = _ends(drawn[:, 0] / drawn[:, 1] - drawn[:, 2] / drawn[:, 3])
    return Estimate(value, low, high, float(sums[3]))


def mcnemar(lost: int, won: int) -> float:
    """The two-sided p-value of so many flips in each direction, if either were as likely (McNemar 1947, exact).

    The flips are taken as independent, which those of one picture are not quite.
    """
    flips, fewer = lost + won, min(lost, won)
    term = total = 1
    for k in range(fewer):
        term = term * (flips - k) // (k + 1)
        total += term
    return min(1.0, float(2 * total / 2**flips)) if flips else 1.0


def _ratios(pairs: F64) -> F64:
    drawn = _drawn(pairs)
    ratios: F64 = drawn[:, 0] / drawn[:, 1]
    return ratios


def _drawn(columns: F64) -> F64:
    """Sums [draws, columns] of as many rows as there are, drawn with replacement; blocks bound the memory."""
    rng, rows = np.random.default_rng(SEED), len(columns)
    block = max(1, _BLOCK // rows)
    parts = []
    for start in range(0, DRAWS, block):
        times = rng.multinomial(rows, np.full(rows, 1 / rows), size=min(block, DRAWS - start))
        parts.append(times @ columns)
    drawn: F64 = np.concatenate(parts)
    return drawn


def _ends(values: F64) -> tuple[float, float]:
    low, high = np.quantile(values, (TAIL, 1 - TAIL))
    return float(low), float(high)
