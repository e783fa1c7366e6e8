"""One question to one model, and the scores of what it answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, replace

from vlmedge.answer import Answer
from vlmedge.errors import ContextError, UnsupportedError
from vlmedge.evaluation.question import Picture, Question
from vlmedge.evaluation.row import Row
from vlmedge.scoring import anls, exact, match_boxes, match_points, vqa
from vlmedge.session import U8
from vlmedge.skills import Model


def ask(model: Model, image: U8, picture: Picture, question: Question, max_tokens: int | None = None) -> Row:
    """Ask and score. `image`: the picture, RGB uint8 [h, w, 3]; `max_tokens`: of a text.

    A question that the model has no skill for is not scored; one that does not fit its context counts as wrong.
    """
    try:
        answer, problem = _answer(model, image, question, max_tokens), ""
    except UnsupportedError as error:
        return Row(question.id, picture.name, question.kind, question.skill, None, problem=str(error))
    except ContextError as error:
        answer, problem = Answer(question.skill), str(error)
    row = Row(
        question.id,
        picture.name,
        question.kind,
        question.skill,
        False,
        text=answer.text,
        boxes=tuple(astuple(box) for box in answer.boxes),
        points=tuple(astuple(point) for point in answer.points),
        tokens=len(answer.tokens),
        finish=answer.finish,
        ms=answer.timings_ms.get("total", 0.0),
        problem=problem,
    )
    return score(row, answer, question, image.shape[1], image.shape[0])


def ask_all(
    model: Model, asked: Iterable[tuple[Picture, Sequence[Question]]], max_tokens: int | None = None
) -> Iterator[Row]:
    """Picture by picture, all its questions together, so that a picture is encoded once."""
    for picture, questions in asked:
        image = picture.open()
        for question in questions:
            yield ask(model, image, picture, question, max_tokens)


def score(row: Row, answer: Answer, question: Question, width: int, height: int) -> Row:
    """The row with its scores; `width` and `height` are the picture's in pixels."""
    if question.skill in ("query", "caption"):
        return _text_scores(row, question)
    if question.skill == "detect":
        wanted, found = len(question.boxes), len(answer.boxes)
        hits, overlap = match_boxes(question.boxes, answer.boxes)
    else:
        places, overlap = question.places(width, height), 0.0
        wanted, found = len(places), len(answer.points)
        hits = match_points(places, [(p.x, p.y) for p in answer.points])
    right = not row.problem and hits == wanted == found
    return replace(row, right=right, things=wanted, hits=hits, overlap=overlap)


def _text_scores(row: Row, question: Question) -> Row:
    right = row.text.strip() in question.answers if question.strict else exact(row.text, question.answers)
    right = right and not row.problem
    soft, likeness = (0.0, 0.0) if row.problem else (vqa(row.text, question.answers), anls(row.text, question.answers))
    return replace(row, right=right, exact=float(right), soft=soft, anls=likeness)


def _answer(model: Model, image: U8, question: Question, max_tokens: int | None) -> Answer:
    if question.skill == "query":
        return model.query(image, question.text, spatial_refs=question.refs, max_tokens=max_tokens)
    if question.skill == "caption":
        return model.caption(image, question.text, max_tokens=max_tokens)
    if question.skill == "detect":
        return model.detect(image, question.text)
    return model.point(image, question.text)
