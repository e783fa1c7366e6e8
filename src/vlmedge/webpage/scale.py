"""Axes, logarithmic and linear: which values get a name and where a value lies."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from vlmedge.webpage.numbers import number, power

_DECADES = 12
_TICKS = 6


class Axis(Protocol):
    """What a plot asks of its axis."""

    def place(self, value: float) -> float:
        """Where a value lies, 0..1; what is outside lies at the end, what is no number at 1."""

    def marks(self) -> list[tuple[str, float]]:
        """The names along it, at most six, and where they lie."""


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

    def marks(self) -> list[tuple[str, float]]:
        """The names of `ticks`."""
        return [(power(exponent), place) for exponent, place in self.ticks()]


@dataclass(frozen=True, slots=True)
class LinearAxis:
    """From `low` to `high`, whole multiples of `step`, which is 1, 2 or 5 times a power of ten; `unit` is written."""

    low: float
    high: float
    step: float
    unit: str = ""

    def place(self, value: float) -> float:
        """Where a value lies, 0..1; what is outside lies at the end, what is no number at 1."""
        if math.isnan(value):
            return 1.0
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)

    def marks(self) -> list[tuple[str, float]]:
        """The multiples of the step, at most six, and where they lie."""
        count = round((self.high - self.low) / self.step)
        return [(f"{number(self._mark(i))}{self.unit}", i / count) for i in range(count + 1)]

    def _mark(self, i: int) -> float:
        return float(f"{self.low + i * self.step:.10g}")


def log_axis(values: Iterable[float]) -> LogAxis:
    """An axis that holds all positive finite values, but no more than twelve decades below the largest."""
    logs = [math.log10(v) for v in values if math.isfinite(v) and v > 0] or [0.0]
    high = math.floor(max(logs)) + 1
    return LogAxis(max(min(math.floor(min(logs)), high - 1), high - _DECADES), high)


def linear_axis(values: Iterable[float], *, zero: bool = True, unit: str = "") -> LinearAxis:
    """An axis that holds all finite values, and 0 unless `zero` is false; its ends are round numbers."""
    found = [v for v in values if math.isfinite(v)] + ([0.0] if zero else [])
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    if not high > low:
        low, high = (low, low + (abs(low) or 1.0)) if zero else (low - (abs(low) or 1.0), low + (abs(low) or 1.0))
    step = _step(high - low)
    return LinearAxis(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, step, unit)


def _step(span: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that goes into the span at most four times, ends not rounded yet."""
    decade = 10.0 ** math.floor(math.log10(span / (_TICKS - 2)))
    return next(factor * decade for factor in (1, 2, 5, 10) if span / (factor * decade) <= _TICKS - 2 + 1e-9)
