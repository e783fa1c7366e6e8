"""A user's question set: one JSON object a line, read strictly."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from vlmedge.answer import Box, Point
from vlmedge.errors import UsageError
from vlmedge.evaluation.question import Picture, Question, Skill
from vlmedge.picture import load_picture
from vlmedge.progress import Progress
from vlmedge.prompt import Reference
from vlmedge.records import decode
from vlmedge.scoring import PEOPLE

MANY = 100  # pictures that are worth a progress bar while their files are read


@dataclass(frozen=True, slots=True)
class Line:
    """The keys of one line; `image` is relative to the file's folder. docs/eval.md says what each means."""

    image: str
    id: str | int | None = None
    skill: Literal["query", "caption", "detect", "point"] = "query"
    question: str | None = None
    object: str | None = None
    length: Literal["short", "normal", "long"] | None = None
    answers: tuple[str, ...] | None = None
    boxes: tuple[tuple[float, float, float, float], ...] | None = None
    points: tuple[tuple[float, float], ...] | None = None
    refs: tuple[tuple[float, ...], ...] = ()
    kind: str | None = None


def read_jsonl(path: Path, progress: Progress | None = None) -> tuple[str, tuple[Picture, ...]]:
    """A hash of the file and its pictures' files, and the pictures in the order of their first lines, with questions.

    A picture that is not there counts as that: whoever asks about it is told. Raises UsageError with file and line for
    what cannot be meant.
    """
    data = _bytes(path)
    questions: dict[str, list[Question]] = {}
    seen: dict[str, int] = {}
    for number, line in _lines(path, data):
        where = f"{path} line {number}"
        question = _question(line, number, where)
        if question.id in seen:
            raise UsageError(f"{where} has the id '{question.id}' of line {seen[question.id]}; ids are unique")
        seen[question.id] = number
        questions.setdefault(line.image, []).append(question)
    if not questions:
        raise UsageError(f"{path} holds no questions; docs/eval.md shows the lines that are read")
    pictures = tuple(_picture(name, path.parent / name, asked) for name, asked in questions.items())
    return _digest(data, [path.parent / name for name in questions], progress or Progress()), pictures


def _digest(data: bytes, files: list[Path], progress: Progress) -> str:
    if len(files) >= MANY:
        progress.stage(f"reading {len(files)} pictures", len(files))
    digest = hashlib.sha256(data)
    for file in files:
        digest.update(_picture_digest(file))
        if len(files) >= MANY:
            progress.advance(1)
    return digest.hexdigest()


def _picture_digest(file: Path) -> bytes:
    """The SHA-256 of a file; zeros for one that cannot be read, or is a pipe, which would wait for ever."""
    try:
        state = file.stat()
        if stat.S_ISREG(state.st_mode):
            return _hashed(os.path.abspath(file), state.st_size, state.st_mtime_ns)
    except (OSError, ValueError):  # a name with a zero byte is a ValueError
        return bytes(32)
    return bytes(32)


@cache  # every model and every part of a cluster's work opens the set again
def _hashed(path: str, size: int, changed: int) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _picture(name: str, file: Path, asked: list[Question]) -> Picture:
    return Picture(name, partial(load_picture, file), tuple(asked), file)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"there is no question file {path} (and --data demo is the demo's set)") from None
    except OSError as error:
        raise UsageError(f"the question file {path} cannot be read: {error.strerror}") from None


def _lines(path: Path, data: bytes) -> Iterator[tuple[int, Line]]:
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not raw.strip():
            continue
        where = f"{path} line {number}"
        try:
            entry: Any = json.loads(raw.decode("utf-8"), object_pairs_hook=partial(_once, where))
        except UnicodeDecodeError:
            raise UsageError(f"{where} is not UTF-8 text") from None
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{where} is not JSON: {' '.join(str(error).split())[:200]}") from None
        yield number, decode(Line, entry, f"{where}: the entry")


def _once(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise UsageError(f"{where} has the key '{twice[:80]}' twice")
    return table


# For each skill: the keys it needs one of, group by group, and the keys it may have besides.
_NEEDS: dict[Skill, tuple[tuple[str, ...], ...]] = {
    "query": (("question",), ("answers",)),
    "caption": (("answers",),),
    "detect": (("object", "question"), ("boxes",)),
    "point": (("object", "question"), ("boxes", "points")),
}
_MAY: dict[Skill, tuple[str, ...]] = {"query": ("refs",), "caption": ("length",), "detect": (), "point": ()}


def _question(line: Line, number: int, where: str) -> Question:
    _check_keys(line, where)
    _check_answers(line, where)
    text = line.length or "normal" if line.skill == "caption" else line.object or line.question or ""
    if not text.strip():
        raise UsageError(f"{where} asks nothing: its {'object' if line.object is not None else 'question'} is empty")
    ident = f"line{number}" if line.id is None else str(line.id)
    boxes = tuple(Box(*_box(box, where)) for box in line.boxes or ())
    points = tuple(Point(*_point(point, where)) for point in line.points or ())
    refs = tuple(_ref(ref, where) for ref in line.refs)
    kind = line.kind or line.skill
    return Question(ident, kind, line.skill, text, line.answers or (), boxes, points, refs)


def _check_keys(line: Line, where: str) -> None:
    """Every group has one key, and no key is there that the skill would ignore."""
    groups = _NEEDS[line.skill]
    for group in groups:
        given = [key for key in group if getattr(line, key) is not None]
        if not given:
            raise UsageError(f"{where}: {line.skill} needs {' or '.join(repr(key) for key in group)}")
        if len(given) > 1 and "object" in group:
            raise UsageError(f"{where}: {line.skill} takes 'object' or 'question', not both")
    used = {key for group in groups for key in group} | set(_MAY[line.skill])
    for key in ("question", "object", "length", "answers", "boxes", "points", "refs"):
        if getattr(line, key) not in (None, ()) and key not in used:
            raise UsageError(f"{where}: {line.skill} has no use for {key!r}; leave it out, or is it another skill?")


def _check_answers(line: Line, where: str) -> None:
    answers = line.answers
    if answers is not None and not 1 <= len(answers) <= PEOPLE:
        raise UsageError(f"{where} has {len(answers)} answers; 1 to {PEOPLE} are accepted")


def _box(box: tuple[float, float, float, float], where: str) -> tuple[float, float, float, float]:
    _check_fractions(box, where)
    if not (box[0] < box[2] and box[1] < box[3]):
        raise UsageError(f"{where}: a box is [x_min, y_min, x_max, y_max] with min < max, not {list(box)}")
    return box


def _point(point: tuple[float, float], where: str) -> tuple[float, float]:
    _check_fractions(point, where)
    return point


def _ref(ref: tuple[float, ...], where: str) -> Reference:
    if len(ref) == 4:
        return _box((ref[0], ref[1], ref[2], ref[3]), where)
    if len(ref) != 2:
        raise UsageError(f"{where}: a reference is a point [x, y] or a box, not {len(ref)} numbers")
    return _point((ref[0], ref[1]), where)


def _check_fractions(values: tuple[float, ...], where: str) -> None:
    if not all(0 <= value <= 1 for value in values):
        raise UsageError(f"{where}: coordinates are fractions of width and height (0..1), not {list(values)}")
