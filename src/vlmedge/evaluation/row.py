"""One answered question with its scores: a line of the journal."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vlmedge.errors import OutputError
from vlmedge.records import decode


@dataclass(frozen=True, slots=True)
class Row:
    """One answered question.

    `id`, `picture`, `kind`, `skill` are the question's. `boxes` (x_min, y_min, x_max, y_max) and `points` (x, y) are
    fractions of the picture's width and height. `right`: the text is an accepted one, or as many boxes or points were
    found as are wanted, each on its thing. `exact`, `soft`, `anls` are scores of 0..1 of a text and None for boxes and
    points, which have `things` (wanted), `hits` and `overlap` (sum of IoU). `problem` says why there is no answer:
    with `right` None the model lacks the skill and the question does not count, else it counts as wrong.
    `ms`: from the question (and, where it is the picture's first, the picture) to the last token.
    """

    id: str
    picture: str
    kind: str
    skill: str
    right: bool | None
    text: str = ""
    boxes: tuple[tuple[float, ...], ...] = ()
    points: tuple[tuple[float, ...], ...] = ()
    exact: float | None = None
    soft: float | None = None
    anls: float | None = None
    things: int = 0
    hits: int = 0
    overlap: float = 0.0
    tokens: int = 0
    finish: str = ""
    ms: float = 0.0
    problem: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The row as JSON data."""
        return asdict(self)


def read_row(data: Any, where: str) -> Row:
    """A row out of JSON data; raises OutputError, which names the place `where`, for what is none."""
    return decode(Row, data, where, OutputError)
