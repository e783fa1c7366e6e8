"""The pieces of a plot: its frame, text, lines, bars and marks, in units of which it is 320 wide."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Final

from vlmedge.webpage.markup import Html, element

WIDTH: Final = 320


def plot(height: float, title: str, description: str, parts: Iterable[Html]) -> Html:
    """The frame: as wide as its box but no wider than 440 pixels; title and description are for screen readers."""
    spoken = (element("title", title), element("desc", description))
    return element("svg", *spoken, *parts, class_="plot", role="img", viewBox=f"0 0 {WIDTH} {height:g}")


def cut(words: str, most: int) -> str:
    """As much of a text as fits into so many letters; Chinese and Japanese ones take two, m and w one and a half."""
    widths = [2.0 if unicodedata.east_asian_width(c) in "WF" else 1.5 if c in "mwMW@%" else 1.0 for c in words]
    if sum(widths) <= most:
        return words
    while sum(widths) > most - 1:
        widths.pop()
    return f"{words[: len(widths)]}…"


def text(words: str, x: float, y: float, kind: str, anchor: str) -> Html:
    """Text at a baseline; `anchor`: start, middle or end."""
    return element("text", words, x=x, y=y, class_=kind, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Html:
    """A line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def rect(x: float, y: float, width: float, kind: str, *content: Html) -> Html:
    """A bar, ten units high."""
    return element("rect", *content, x=x, y=y, width=width, height=10, rx=2, class_=kind)


def mark(x: float, y: float, radius: float, state: str) -> Html:
    """A value: a dot ("plain"), a hollow diamond ("warn") or a square ("bad")."""
    if state == "plain":
        return element("circle", cx=x, cy=y, r=radius, class_="mark plain")
    r = radius + 1  # what differs is seen first
    turn = f"rotate(45 {x:.2f} {y:.2f})" if state == "warn" else None
    return element("rect", x=x - r, y=y - r, width=2 * r, height=2 * r, transform=turn, class_=f"mark {state}")


def heading(label: str, note: str, y: float, state: str) -> list[Html]:
    """The line above a bar: its name to the left, its value to the right."""
    name = element("text", element("title", label), cut(label, 41 - min(len(note), 24)), x=0, y=y + 13)
    return [name, text(note, WIDTH, y + 13, "bad" if state == "bad" else "soft", "end")]


def anchor(x: float) -> str:
    """How a text below a point of the axis is set, so that it stays inside the plot."""
    return "start" if x < 8 else "end" if x > WIDTH - 8 else "middle"
