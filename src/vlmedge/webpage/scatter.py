"""A plot of one number against another: a numbered mark per thing, in an area that may stand for a third."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vlmedge.webpage.field import TOP, Field
from vlmedge.webpage.markup import Html, element, join
from vlmedge.webpage.scale import Axis
from vlmedge.webpage.svg import WIDTH, line, plot, text

_TALL = 180
_LETTER = 8.0  # a digit's width, and a little more
_HIGH = 14.0
_LEAST, _MOST = 4.0, 14.0


@dataclass(frozen=True, slots=True)
class Point:
    """A thing: `key` is written beside it (short: a number), `weight` 0..1 its area, `note` shows under a mouse."""

    key: str
    x: float
    y: float
    weight: float
    state: str
    note: str


@dataclass(frozen=True, slots=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def holds(self, other: _Box) -> bool:
        return (
            self.left <= other.left
            and self.top <= other.top
            and other.right <= self.right
            and other.bottom <= self.bottom
        )

    def meets(self, other: _Box) -> bool:
        return not (
            self.right <= other.left or other.right <= self.left or self.bottom <= other.top or other.bottom <= self.top
        )


def scatter(found: Sequence[Point], x: Axis, y: Axis, names: tuple[str, str], title: str, description: str) -> Html:
    """Marks in a field with the axes' `names` (x, y); a key that has no room beside its mark is left out."""
    field = Field(x, y, _TALL)
    placed = [(p, field.across(p.x), field.up(p.y), _radius(p.weight)) for p in found]
    marks = [
        element("circle", element("title", p.note), cx=at, cy=high, r=radius, class_=f"area {p.state}")
        for p, at, high, radius in sorted(placed, key=lambda p: -p[3])  # the small lie on the large
    ]
    boxes = [_Box(at - r, high - r, at + r, high + r) for _, at, high, r in placed]
    keys = [_key(point, at, high, radius, boxes, field) for point, at, high, radius in placed]
    return plot(field.height, title, description, [*field.frame(names), *marks, *keys])


def _key(point: Point, x: float, y: float, radius: float, taken: list[_Box], field: Field) -> Html:
    """The key at the first free place around its mark, further away with a line to it; what it takes is noted."""
    width = _LETTER * len(point.key) + 4
    whole = _Box(field.left, TOP - 6, WIDTH, field.bottom + 2)
    for gap in (2.0, 12.0, 24.0):
        for cx, cy in _around(x, y, radius + gap, width):
            box = _Box(cx - width / 2, cy - _HIGH / 2, cx + width / 2, cy + _HIGH / 2)
            if whole.holds(box) and not any(box.meets(other) for other in taken):
                taken.append(box)
                lead = line(x, y, (x + 2 * cx) / 3, (y + 2 * cy) / 3, "stem") if gap > 2 else Html()
                return join(lead, text(point.key, cx, cy + 4.5, "", "middle"))
    return Html()


def _around(x: float, y: float, far: float, width: float) -> Iterable[tuple[float, float]]:
    """Middles of a text beside a mark: right, left, above, below, then the corners."""
    for turn in (0, 180, 270, 90, 315, 45, 225, 135):
        across, down = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        yield x + across * (far + width / 2), y + down * (far + _HIGH / 2)


def _radius(weight: float) -> float:
    """The area of a mark, not its radius, goes with the weight."""
    return max(_LEAST, _MOST * math.sqrt(min(max(weight, 0.0), 1.0)))
