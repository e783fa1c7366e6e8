"""A logarithmic axis: which decades it holds and where a value lies on it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_DECADES = 12
_TICKS = 6


@dataclass(frozen=True, slots=True)
class LogAxis:
    """From 10^low to 10^high."""

    low: int
    high: int

    def place(self, value: float) -> float:
        """Where a value lies, 0..1; below the axis is 0, what is above it or no number is 1."""
        if not math.isfinite(value):
            return 0.0 if value == -math.inf else 1.0
        if value <= 0:
            return 0.0
        return min(max((math.log10(value) - self.low) / (self.high - self.low), 0.0), 1.0)

    def ticks(self) -> list[tuple[int, float]]:
        """The exponents that get a name, at most six, and where they lie."""
        step = math.ceil((self.high - self.low) / (_TICKS - 1))
        return [(e, (e - self.low) / (self.high - self.low)) for e in range(self.low, self.high + 1, step)]


def log_axis(values: Iterable[float]) -> LogAxis:
    """An axis that holds all positive finite values, but no more than twelve decades below the largest."""
    logs = [math.log10(v) for v in values if math.isfinite(v) and v > 0] or [0.0]
    high = math.floor(max(logs)) + 1
    return LogAxis(max(min(math.floor(min(logs)), high - 1), high - _DECADES), high)
