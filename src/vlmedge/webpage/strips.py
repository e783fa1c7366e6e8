"""Strips of dots: all samples of each thing on one scale, one line of dots after the other for what came later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmedge.webpage.markup import Html, element
from vlmedge.webpage.scale import Axis
from vlmedge.webpage.svg import WIDTH, anchor, heading, line, plot, text

_HEAD = 20
_LANE = 6
_GAP = 10
_EDGE = 4  # room for half a dot at both ends


@dataclass(frozen=True, slots=True)
class Strip:
    """A named thing with its values, lane by lane from above; `note` is written beside the name."""

    label: str
    lanes: tuple[tuple[float, ...], ...]
    note: str


def strips(rows: Sequence[Strip], axis: Axis, title: str, description: str, centre: float | None = None) -> Html:
    """Dots on one axis; those at its ends lie there or beyond and have the colour of a warning; a line at `centre`."""
    tall = [_HEAD + _LANE * max(len(row.lanes), 1) + _GAP for row in rows]
    bottom = sum(tall)
    parts = [text(name, _along(place), bottom + 14, "soft", anchor(_along(place))) for name, place in axis.marks()]
    y = 0.0
    for row, height in zip(rows, tall, strict=True):
        lanes = height - _HEAD - _GAP
        parts += heading(row.label, row.note, y, "")
        parts.append(element("rect", x=0, y=y + _HEAD - 1, width=WIDTH, height=lanes + 2, rx=2, class_="track"))
        for _, place in axis.marks():
            parts.append(line(_along(place), y + _HEAD - 1, _along(place), y + _HEAD + 1 + lanes, "grid"))
        if centre is not None:
            x = _along(axis.place(centre))
            parts.append(line(x, y + _HEAD - 1, x, y + _HEAD + 1 + lanes, "stem"))
        parts += [_dots(lane, axis, y + _HEAD + _LANE * (i + 0.5)) for i, lane in enumerate(row.lanes)]
        y += height
    return plot(bottom + 20, title, description, parts)


def _dots(lane: Sequence[float], axis: Axis, y: float) -> Html:
    """Round ends of lines without length: a dozen bytes a dot."""
    places = [axis.place(value) for value in lane]
    near = "".join(f"M{_along(p):.1f} {y:.1f}h0" for p in places if 0 < p < 1)
    far = "".join(f"M{_along(p):.1f} {y:.1f}h0" for p in places if not 0 < p < 1)
    drawn = (element("path", d=d, class_=kind) for d, kind in ((near, "specks"), (far, "specks warn")) if d)
    return Html("".join(drawn))


def _along(part: float) -> float:
    return _EDGE + (WIDTH - 2 * _EDGE) * part
