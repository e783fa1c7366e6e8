"""Checks of what a caller gives: points, boxes and counts; each raises UsageError with the value."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

from vlmedge.errors import UsageError
from vlmedge.prompt import Point, Reference


def point(what: str, given: Any) -> Point:
    """A point (x, y) in 0..1."""
    x, y = _fractions(f"{what} is a point (x, y)", given, (2,))
    return x, y


def box(what: str, given: Any) -> tuple[float, float, float, float]:
    """A box (x_min, y_min, x_max, y_max) in 0..1 that has an area."""
    x_min, y_min, x_max, y_max = _fractions(f"{what} is a box (x_min, y_min, x_max, y_max)", given, (4,))
    if not (x_min < x_max and y_min < y_max):
        raise UsageError(f"{what} is a box with x_min < x_max and y_min < y_max, not {given}")
    return x_min, y_min, x_max, y_max


def reference(given: Any) -> Reference:
    """A spatial reference: a point or a box."""
    what = "a spatial reference"
    values = _fractions(f"{what} is a point (x, y) or a box (x_min, y_min, x_max, y_max)", given, (2, 4))
    return point(what, given) if len(values) == 2 else box(what, given)


def count(what: str, given: int | None, default: int) -> int:
    """How many at most, 1 or more; the default for None."""
    if given is None:
        return default
    if given < 1:
        raise UsageError(f"{what} must be 1 or more, not {given}")
    return given


def _fractions(rule: str, given: Any, lengths: Sequence[int]) -> tuple[float, ...]:
    try:
        values = tuple(given)
    except TypeError:
        values = ()
    if len(values) not in lengths or not all(isinstance(v, Real) and 0 <= float(v) <= 1 for v in values):
        raise UsageError(f"{rule} of numbers in 0..1, not {given!r}")
    return tuple(float(v) for v in values)
