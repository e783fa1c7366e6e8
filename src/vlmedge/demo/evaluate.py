"""How well a model sees: exact answers, boxes and points on made-up pictures, through the public skills alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from vlmedge.demo.questions import Question, questions
from vlmedge.demo.scene import Scene, draw, scene
from vlmedge.prompt import Reference
from vlmedge.scoring import match_boxes, match_points

TEST = 2_000_003  # the seed of the pictures that accuracy is reported on; training and its checks never draw them


class Answered(Protocol):
    """What a skill gives back; boxes and points are in 0..1."""

    @property
    def text(self) -> str:
        """The answer in words."""
        ...

    @property
    def boxes(self) -> Sequence[Any]:
        """Objects with `x_min`, `y_min`, `x_max`, `y_max`."""
        ...

    @property
    def points(self) -> Sequence[Any]:
        """Objects with `x`, `y`."""
        ...


class Sighted(Protocol):
    """A model with the skills that are asked for; `vlmedge.load` gives one."""

    def query(self, image: Any, question: str, *, spatial_refs: Any = ...) -> Answered:
        """Answer a question."""
        ...

    def caption(self, image: Any, length: str = ...) -> Answered:
        """Describe the picture."""
        ...

    def detect(self, image: Any, object: str) -> Answered:
        """Find boxes."""
        ...

    def point(self, image: Any, object: str) -> Answered:
        """Find points."""
        ...


@dataclass(slots=True)
class Score:
    """Counts and sums over all questions asked; ratios are properties.

    `asked` and `right` count questions by kind: a text is right when it is an accepted one, boxes and points are
    right when they are as many as the things and each belongs to its thing. `things`, `hits` count the things to
    find by skill: a point hits inside the shape, a box with an overlap (IoU) of at least 0.5. `overlap` sums the IoU,
    0 for a thing that was not found.
    """

    asked: dict[str, int] = field(default_factory=dict)
    right: dict[str, int] = field(default_factory=dict)
    things: dict[str, int] = field(default_factory=dict)
    hits: dict[str, int] = field(default_factory=dict)
    overlap: float = 0.0

    @property
    def exact(self) -> float:
        """The share of text answers (questions and captions) that are right to the letter."""
        kinds = [kind for kind in self.asked if kind not in ("detect", "point")]
        return sum(self.right[k] for k in kinds) / max(1, sum(self.asked[k] for k in kinds))

    @property
    def mean_iou(self) -> float:
        """The mean overlap of the boxes with the things."""
        return self.overlap / max(1, self.things.get("detect", 0))

    @property
    def kinds(self) -> dict[str, float]:
        """The share of right answers by kind of question."""
        return {kind: self.right[kind] / self.asked[kind] for kind in sorted(self.asked)}

    def hit_rate(self, skill: str) -> float:
        """The share of things that `detect` or `point` hit."""
        return self.hits.get(skill, 0) / max(1, self.things.get(skill, 0))

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        rates = {f"{skill}_hits": self.hit_rate(skill) for skill in ("detect", "point")}
        return {
            "questions": sum(self.asked.values()), "exact": self.exact, "mean_iou": self.mean_iou, **rates,
            "kinds": self.kinds,
        }  # fmt: skip


def unseen(count: int, first: int = 0) -> list[Scene]:
    """The pictures that accuracy is reported on."""
    return [scene(TEST, first + i) for i in range(count)]


def evaluate(model: Sighted, pictures: Iterable[Scene], *, keep: Callable[[Question], bool] | None = None) -> Score:
    """Ask every question of every picture (those that `keep` accepts) and count."""
    score = Score()
    for content in pictures:
        image = draw(content)
        for question in questions(content):
            if keep is None or keep(question):
                _ask(score, model, content, image, question)
    return score


def _ask(score: Score, model: Sighted, content: Scene, image: Any, question: Question) -> None:
    if question.skill == "query":
        refers = spatial_refs(content, question)
        text = (
            model.query(image, question.text, spatial_refs=refers) if refers else model.query(image, question.text)
        ).text
        right = text.strip() in question.answers
    elif question.skill == "caption":
        right = model.caption(image, question.text).text.strip() in question.answers
    elif question.skill == "detect":
        right = _boxes(score, content, question, model.detect(image, question.text).boxes)
    else:
        right = _points(score, content, question, model.point(image, question.text).points)
    score.asked[question.kind] = score.asked.get(question.kind, 0) + 1
    score.right[question.kind] = score.right.get(question.kind, 0) + right


def spatial_refs(content: Scene, question: Question) -> tuple[Reference, ...]:
    """What a question points at, as `query` takes it: a point (x, y) or a box, or nothing."""
    if question.refers is None:
        return ()
    how, index = question.refers
    box = content.things[index].box
    return (box.center,) if how == "point" else ((box.x_min, box.y_min, box.x_max, box.y_max),)


def _boxes(score: Score, content: Scene, question: Question, found: Sequence[Any]) -> bool:
    hits, overlap = match_boxes([content.things[i].box for i in question.targets], found)
    score.overlap += overlap
    return _count(score, "detect", question, hits, len(found))


def _points(score: Score, content: Scene, question: Question, found: Sequence[Any]) -> bool:
    at = [(p.x * content.width, p.y * content.height) for p in found]
    hits = match_points([content.things[i].holds for i in question.targets], at)
    return _count(score, "point", question, hits, len(found))


def _count(score: Score, skill: str, question: Question, hits: int, found: int) -> bool:
    score.things[skill] = score.things.get(skill, 0) + len(question.targets)
    score.hits[skill] = score.hits.get(skill, 0) + hits
    return hits == len(question.targets) == found
