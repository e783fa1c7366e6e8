"""A plot of values over time: a line per thing, told apart by its colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmedge.webpage.field import Field
from vlmedge.webpage.markup import Html, element
from vlmedge.webpage.plot import COLOURS
from vlmedge.webpage.scale import Axis
from vlmedge.webpage.svg import plot

MOST = COLOURS  # curves in one plot
_TALL = 150


@dataclass(frozen=True, slots=True)
class Curve:
    """A named line through (x, y) points, in their order."""

    label: str
    points: tuple[tuple[float, float], ...]


def curves(found: Sequence[Curve], x: Axis, y: Axis, names: tuple[str, str], title: str, description: str) -> Html:
    """Lines in a field with the axes' `names` (x, y); `legend` of `colour` says which is which; at most `MOST`."""
    field = Field(x, y, _TALL)
    parts = field.frame(names)
    for i, curve in enumerate(found):
        places = [(field.across(a), field.up(b)) for a, b in curve.points]
        path = " ".join(f"{across:.1f},{up:.1f}" for across, up in places)
        parts.append(element("polyline", element("title", curve.label), points=path, class_=f"curve {colour(i)}"))
        if len(places) == 1:  # a line of one point is not seen
            parts.append(element("circle", cx=places[0][0], cy=places[0][1], r=3, class_=colour(i)))
    return plot(field.height, title, description, parts)


def colour(i: int) -> str:
    """The colour of a plot's i-th curve, for its legend."""
    return f"s{i % COLOURS}"
