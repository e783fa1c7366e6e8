"""Plots as SVG inside the page: bars against limits, values along positions, stacked bars, legends.

All are 320 units wide and are shown at about one pixel a unit on a phone, so their text can be read there. Colours
come from the page's style, light or dark. A plot has a title and a description for those who cannot see it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from vlmedge.webpage.markup import Html, element
from vlmedge.webpage.numbers import number
from vlmedge.webpage.scale import Axis, LogAxis
from vlmedge.webpage.svg import WIDTH, anchor, heading, line, mark, plot, rect, text

_LEFT = 34  # for the names of the decades beside dots
_MIDDLE = (_LEFT + WIDTH) / 2
_TALL = 128
_ROW = 40
COLOURS: Final = 9


@dataclass(frozen=True, slots=True)
class Bar:
    """A named value with its limit (None: none), how it went ("good", "bad", "plain") and what to write beside it."""

    label: str
    value: float
    limit: float | None
    state: str
    note: str


@dataclass(frozen=True, slots=True)
class Dot:
    """A value at a position; "plain", "warn" or "bad" as `state`; `note` shows under a mouse."""

    position: int
    value: float
    state: str
    note: str


@dataclass(frozen=True, slots=True)
class Stack:
    """A named bar of (name, value) pieces, `note` to write beside it; values are not negative."""

    label: str
    pieces: tuple[tuple[str, float], ...]
    note: str


def bars(rows: Sequence[Bar], axis: Axis, title: str, description: str) -> Html:
    """Horizontal bars on one axis, each under its name, with a tick at its limit."""
    bottom = _ROW * len(rows)
    places = [(name, _along(place)) for name, place in axis.marks()]
    parts = [text(name, x, bottom + 14, "soft", anchor(x)) for name, x in places]
    for i, row in enumerate(rows):
        y = _ROW * i
        parts += [*heading(row.label, row.note, y, row.state), rect(0, y + 20, WIDTH, "track")]
        parts += [line(x, y + 17, x, y + 33, "grid") for _, x in places]  # not through the words
        parts.append(rect(0, y + 20, max(2.0, _along(axis.place(row.value))), f"bar {row.state}"))
        if row.limit is not None:
            x = _along(axis.place(row.limit))
            parts.append(line(x, y + 16, x, y + 34, "limit"))
    return plot(bottom + 20, title, description, parts)


def dots(found: Sequence[Dot], axis: LogAxis, title: str, description: str) -> Html:
    """A stem and a mark per position on a logarithmic axis: a dot, a hollow diamond ("warn") or a square ("bad")."""
    first, last = min(d.position for d in found), max(d.position for d in found)
    parts = []
    for name, place in axis.marks():
        y = _up(place)
        parts += [line(_LEFT, y, WIDTH, y, "grid"), text(name, _LEFT - 4, y + 4, "soft", "end")]
    radius = 3.0 if len(found) <= 60 else 1.8
    for dot in sorted(found, key=lambda d: ("plain", "warn", "bad").index(d.state)):
        x = _LEFT + 8 + (WIDTH - _LEFT - 16) * ((dot.position - first) / (last - first) if last > first else 0.5)
        y = _up(axis.place(dot.value))
        stem, sign = line(x, _up(0), x, y, f"stem {dot.state}"), mark(x, y, radius, dot.state)
        parts.append(element("g", element("title", dot.note), stem, sign))
    ends = [(last, WIDTH, "end"), (first, _LEFT + 8, "middle")] if last > first else [(first, _MIDDLE, "middle")]
    parts += [text(str(position), x, _TALL + 30, "soft", side) for position, x, side in ends]
    return plot(_TALL + 36, title, description, parts)


def stacks(rows: Sequence[Stack], title: str, description: str, names: Iterable[str] = ()) -> Html:
    """Horizontal bars of coloured pieces on one linear scale; `legend` of `colours` says what is what.

    `names`: pieces whose colours come first, so that several plots agree.
    """
    colour = colours(rows, names)
    longest = max((sum(v for _, v in row.pieces) for row in rows), default=0.0) or 1.0
    parts = []
    for i, row in enumerate(rows):
        parts += [*heading(row.label, row.note, _ROW * i, ""), rect(0, _ROW * i + 20, WIDTH, "track")]
        x = 0.0
        for name, value in row.pieces:
            width = WIDTH * value / longest
            piece = rect(x, _ROW * i + 20, width, colour[name], element("title", f"{name}: {number(value)}"))
            parts.append(piece)
            x += width
    return plot(_ROW * len(rows), title, description, parts)


def colours(rows: Iterable[Stack], names: Iterable[str] = ()) -> dict[str, str]:
    """The colour of every piece's name, `names` first, then in order of appearance; from the tenth on they repeat."""
    found = dict.fromkeys((*names, *(name for row in rows for name, _ in row.pieces)))
    return {name: f"s{i % COLOURS}" for i, name in enumerate(found)}


def legend(items: Iterable[tuple[str, str]]) -> Html:
    """Signs and what they mean: (sign, text); "plain", "warn" and "bad" are marks, "limit" a tick, else a colour."""
    found = (element("li", element("svg", _sign(s), viewBox="0 0 14 14", aria_hidden="true"), t) for s, t in items)
    return element("ul", *found, class_="legend")


def figure(title: str, sentence: str, drawing: Html) -> Html:
    """A plot in a frame with its title and a sentence above it."""
    return element("figure", element("figcaption", element("strong", title), sentence), drawing)


def _sign(sign: str) -> Html:
    if sign == "limit":
        return line(7, 0, 7, 14, "limit")
    if sign in ("plain", "warn", "bad"):
        return mark(7, 7, 3.5, sign)
    return element("rect", x=1, y=1, width=12, height=12, rx=3, class_=sign)


def _along(part: float) -> float:
    return WIDTH * part


def _up(part: float) -> float:
    return 10 + _TALL * (1 - part)
