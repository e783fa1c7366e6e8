"""The pieces of a plot: its frame, text, lines and rectangles, in units of which it is 320 wide."""

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
    """As much of a text as fits into so many letters; Chinese and Japanese ones take two."""
    widths = [2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in words]
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
