"""The field of a plot with two axes: its lines, their names, and where a pair of values lies in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from vlmedge.webpage.markup import Html
from vlmedge.webpage.scale import Axis
from vlmedge.webpage.svg import WIDTH, cut, line, text

TOP: Final = 22  # above it the y axis's name
_BELOW = 40  # for the x axis's numbers and its name
_LETTER = 7.6
_SIDE = 10  # to the left of the first value
_END = 16  # to the right of the last: half a mark, or half of the x axis's longest number


@dataclass(frozen=True, slots=True)
class Field:
    """`tall` units high under `TOP`; as far to the right as the y axis's numbers need."""

    x: Axis
    y: Axis
    tall: float

    @property
    def left(self) -> float:
        """Where it begins."""
        return max(8 + _LETTER * max((len(name) for name, _ in self.y.marks()), default=0), 30.0)

    @property
    def bottom(self) -> float:
        """Where it ends."""
        return TOP + self.tall

    @property
    def height(self) -> float:
        """Of the whole plot."""
        return self.bottom + _BELOW

    def across(self, value: float) -> float:
        """Where a value of the x axis lies."""
        return self._across(self.x.place(value))

    def up(self, value: float) -> float:
        """Where a value of the y axis lies."""
        return self._up(self.y.place(value))

    def frame(self, names: tuple[str, str]) -> list[Html]:
        """The lines of both axes, their numbers and their `names` (x, y)."""
        across, up = names
        parts = [
            text(cut(up, 40), 0, 12, "soft", "start"),
            text(cut(across, 40), WIDTH, self.height - 6, "soft", "end"),
        ]
        for name, place in self.y.marks():
            y = self._up(place)
            parts += [line(self.left, y, WIDTH, y, "grid"), text(name, self.left - 5, y + 4, "soft", "end")]
        for name, place in self.x.marks():
            x = self._across(place)
            parts += [line(x, TOP, x, self.bottom, "grid"), text(name, x, self.bottom + 16, "soft", "middle")]
        return parts

    def _across(self, part: float) -> float:
        right = max(_END, _LETTER / 2 * max((len(name) for name, _ in self.x.marks()), default=0) + 1)
        return self.left + _SIDE + (WIDTH - self.left - _SIDE - right) * part

    def _up(self, part: float) -> float:
        return TOP + 8 + (self.tall - 16) * (1 - part)
