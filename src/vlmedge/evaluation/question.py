"""A picture and the questions about it, with what counts as right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlmedge.answer import Box, Point
from vlmedge.prompt import Reference
from vlmedge.scoring import Holds, near
from vlmedge.session import U8

Skill = Literal["query", "caption", "detect", "point"]
SKILLS: tuple[Skill, ...] = ("query", "caption", "detect", "point")


@dataclass(frozen=True, slots=True)
class Question:
    """One question about a picture.

    `text`: the question, the caption's length, or the object to find. `kind`: the group that it is counted in.
    `answers`: accepted texts, or what ten people said (see `scoring.vqa`); `strict`: only to the letter.
    `boxes`, `points`: what is to be found, in fractions of the picture's width and height. `shapes`: the same as
    outlines, each telling whether (x, y) in fractions lies inside; they decide where a point hits, then the boxes do,
    and only where there are none the distance to the points. `refs`: points (x, y) or boxes that a question is about.
    """

    id: str
    kind: str
    skill: Skill
    text: str
    answers: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    points: tuple[Point, ...] = ()
    refs: tuple[Reference, ...] = ()
    strict: bool = False
    shapes: tuple[Holds, ...] = ()

    def places(self, width: int, height: int) -> list[Holds]:
        """For each thing to point at, whether (x, y) in fractions hits it, in a picture of so many pixels."""
        if self.shapes:
            return list(self.shapes)
        return [_inside(box) for box in self.boxes] or [near(p.x, p.y, width, height) for p in self.points]


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture by name, how to get its pixels (RGB uint8 [h, w, 3]), the questions about it, and its file, if any."""

    name: str
    open: Callable[[], U8]
    questions: tuple[Question, ...]
    file: Path | None = None


def _inside(box: Box) -> Holds:
    return lambda x, y: box.x_min <= x <= box.x_max and box.y_min <= y <= box.y_max
