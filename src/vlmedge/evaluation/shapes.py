"""The demo generator's pictures as a question set."""

from __future__ import annotations

import hashlib
import json
from functools import partial

from vlmedge.answer import Box, Point
from vlmedge.demo.evaluate import spatial_refs, unseen
from vlmedge.demo.questions import Question as Asked
from vlmedge.demo.questions import questions
from vlmedge.demo.scene import Scene, Thing, draw
from vlmedge.evaluation.question import Picture, Question
from vlmedge.scoring import Holds

_SAMPLE = 20  # pictures whose questions stand for the generator's version


def demo_pictures(count: int) -> tuple[Picture, ...]:
    """The first pictures that accuracy is reported on, with every question that `demo.evaluate` asks."""
    return tuple(_picture(content) for content in unseen(count))


def demo_digest() -> str:
    """A hash of the first questions and answers: another version of the generator asks something else."""
    asked = [[(q.kind, q.skill, q.text, q.answers) for q in questions(content)] for content in unseen(_SAMPLE)]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _picture(content: Scene) -> Picture:
    asked = tuple(_question(content, number, q) for number, q in enumerate(questions(content)))
    return Picture(f"shapes/{content.index}", partial(draw, content), asked)


def _question(content: Scene, number: int, asked: Asked) -> Question:
    things = [content.things[i] for i in asked.targets]
    boxes = tuple(Box(t.box.x_min, t.box.y_min, t.box.x_max, t.box.y_max) for t in things)
    return Question(
        f"{content.index}/{number}",
        asked.kind,
        asked.skill,
        asked.text,
        asked.answers,
        boxes if asked.skill == "detect" else (),
        tuple(Point(*t.box.center) for t in things) if asked.skill == "point" else (),
        spatial_refs(content, asked),
        strict=True,
        shapes=tuple(_holds(content, t) for t in things) if asked.skill == "point" else (),
    )


def _holds(content: Scene, thing: Thing) -> Holds:
    return lambda x, y: thing.holds(x * content.width, y * content.height)
