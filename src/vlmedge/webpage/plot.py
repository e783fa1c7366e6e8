"""Plots as SVG inside the page: bars against limits, values along positions, stacked bars.

All are 320 units wide and are shown at about one pixel a unit on a phone, so their text can be read there. Colours
come from the page's style, light or dark. A plot has a title and a description for those who cannot see it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vlmedge.webpage.markup import Html, element
from vlmedge.webpage.numbers import number, power
from vlmedge.webpage.scale import LogAxis
from vlmedge.webpage.svg import WIDTH, cut, line, plot, rect, text

_LEFT = 34  # for the names of the decades beside dots
_MIDDLE = (_LEFT + WIDTH) / 2
_TALL = 128
_ROW = 40
_COLOURS = 6


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


def bars(rows: Sequence[Bar], axis: LogAxis, title: str, description: str) -> Html:
    """Horizontal bars on a logarithmic axis, each under its name, with a tick at its limit."""
    bottom = _ROW * len(rows)
    parts = []
    for exponent, place in axis.ticks():
        x = _along(place)
        parts += [line(x, 0, x, bottom, "grid"), text(power(exponent), x, bottom + 14, "soft", _anchor(x))]
    for i, row in enumerate(rows):
        y = _ROW * i
        parts += [*_name(row.label, row.note, y, row.state), rect(0, y + 20, WIDTH, "track")]
        parts.append(rect(0, y + 20, max(2.0, _along(axis.place(row.value))), f"bar {row.state}"))
        if row.limit is not None:
            x = _along(axis.place(row.limit))
            parts.append(line(x, y + 16, x, y + 34, "limit"))
    return plot(bottom + 20, title, description, parts)


def dots(found: Sequence[Dot], axis: LogAxis, title: str, description: str) -> Html:
    """A stem and a mark per position on a logarithmic axis: a dot, a hollow diamond ("warn") or a square ("bad")."""
    first, last = min(d.position for d in found), max(d.position for d in found)
    parts = []
    for exponent, place in axis.ticks():
        y = _up(place)
        parts += [line(_LEFT, y, WIDTH, y, "grid"), text(power(exponent), _LEFT - 4, y + 4, "soft", "end")]
    radius = 3.0 if len(found) <= 60 else 1.8
    for dot in sorted(found, key=lambda d: ("plain", "warn", "bad").index(d.state)):
        x = _LEFT + 8 + (WIDTH - _LEFT - 16) * ((dot.position - first) / (last - first) if last > first else 0.5)
        y = _up(axis.place(dot.value))
        stem, mark = line(x, _up(0), x, y, f"stem {dot.state}"), _mark(x, y, radius, dot.state)
        parts.append(element("g", element("title", dot.note), stem, mark))
    ends = [(last, WIDTH, "end"), (first, _LEFT + 8, "middle")] if last > first else [(first, _MIDDLE, "middle")]
    parts += [text(str(position), x, _TALL + 30, "soft", anchor) for position, x, anchor in ends]
    return plot(_TALL + 36, title, description, parts)


def stacks(rows: Sequence[Stack], title: str, description: str) -> Html:
    """Horizontal bars of coloured pieces on one linear scale; `legend` of `colours` says what is what."""
    colour = colours(rows)
    longest = max((sum(v for _, v in row.pieces) for row in rows), default=0.0) or 1.0
    parts = []
    for i, row in enumerate(rows):
        parts += [*_name(row.label, row.note, _ROW * i, ""), rect(0, _ROW * i + 20, WIDTH, "track")]
        x = 0.0
        for name, value in row.pieces:
            width = WIDTH * value / longest
            piece = rect(x, _ROW * i + 20, width, colour[name], element("title", f"{name}: {number(value)}"))
            parts.append(piece)
            x += width
    return plot(_ROW * len(rows), title, description, parts)


def colours(rows: Iterable[Stack]) -> dict[str, str]:
    """The colour of every piece's name, in order of appearance; from the seventh on they repeat."""
    names = dict.fromkeys(name for row in rows for name, _ in row.pieces)
    return {name: f"s{i % _COLOURS}" for i, name in enumerate(names)}


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
        return _mark(7, 7, 3.5, sign)
    return element("rect", x=1, y=1, width=12, height=12, rx=3, class_=sign)


def _mark(x: float, y: float, radius: float, state: str) -> Html:
    if state == "plain":
        return element("circle", cx=x, cy=y, r=radius, class_="mark plain")
    r = radius + 1  # what differs is seen first
    turn = f"rotate(45 {x:.2f} {y:.2f})" if state == "warn" else None
    return element("rect", x=x - r, y=y - r, width=2 * r, height=2 * r, transform=turn, class_=f"mark {state}")


def _name(label: str, note: str, y: float, state: str) -> list[Html]:
    """The line above a bar: its name to the left, its value to the right."""
    name = element("text", element("title", label), cut(label, 41 - min(len(note), 24)), x=0, y=y + 13)
    return [name, text(note, WIDTH, y + 13, "bad" if state == "bad" else "soft", "end")]


def _anchor(x: float) -> str:
    return "start" if x < 8 else "end" if x > WIDTH - 8 else "middle"


def _along(part: float) -> float:
    return WIDTH * part


def _up(part: float) -> float:
    return 10 + _TALL * (1 - part)
