"""A user's question file: what is read, and that anything else is refused with its line."""

import json
import os

import pytest

from vlmedge.answer import Box, Point
from vlmedge.errors import ImageError, UsageError
from vlmedge.evaluation.dataset import open_dataset
from vlmedge.evaluation.evaluate import evaluate
from vlmedge.evaluation.jsonl import MANY, read_jsonl
from vlmedge.evaluation.question import Question
from vlmedge.progress import Progress

ASK = {"image": "a.png", "question": "What is it?", "answers": ["a cat"]}


@pytest.fixture
def write(tmp_path):
    def write(*lines):
        path = tmp_path / "set.jsonl"
        path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines))
        return path

    return write


def test_every_skill(write):
    path = write(
        ASK,
        {"image": "b.png", "id": 7, "question": "Read it", "answers": ["one", "two"], "kind": "reading"},
        b"",
        {"image": "a.png", "skill": "caption", "length": "short", "answers": ["A cat."]},
        {"image": "a.png", "skill": "detect", "object": "dog", "boxes": []},
        {"image": "a.png", "skill": "detect", "question": "cat", "boxes": [[0, 0.25, 1, 0.5]]},
        {"image": "a.png", "skill": "point", "object": "cat", "points": [[0.5, 1]]},
        {"image": "a.png", "question": "This?", "answers": ["cat"], "refs": [[0.5, 0.5], [0, 0, 1, 1]]},
    )
    digest, (first, second) = read_jsonl(path)
    assert len(digest) == 64
    assert (first.name, first.file) == ("a.png", path.parent / "a.png")
    assert first.questions == (
        Question("line1", "query", "query", "What is it?", ("a cat",)),
        Question("line4", "caption", "caption", "short", ("A cat.",)),
        Question("line5", "detect", "detect", "dog"),
        Question("line6", "detect", "detect", "cat", boxes=(Box(0.0, 0.25, 1.0, 0.5),)),
        Question("line7", "point", "point", "cat", points=(Point(0.5, 1.0),)),
        Question("line8", "query", "query", "This?", ("cat",), refs=((0.5, 0.5), (0.0, 0.0, 1.0, 1.0))),
    )
    assert second.questions == (Question("7", "reading", "query", "Read it", ("one", "two")),)
    assert len(open_dataset(str(path), 1).pictures) == 1


def test_a_mark_of_windows_editors_is_no_text(write):
    assert read_jsonl(write(b"\xef\xbb\xbf" + json.dumps(ASK).encode() + b"\r"))[1][0].questions


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"{", "is not JSON"),
        (b"\xff", "is not UTF-8"),
        (b"[1]", "must be a table"),
        (b'{"image": "a", "image": "b"}', "has the key 'image' twice"),
        (ASK | {"anwsers": []}, "unknown key 'anwsers'; did you mean 'answers'?"),
        ({"question": "Q", "answers": ["a"]}, "lacks the key 'image'"),
        (ASK | {"image": 3}, "image must be a string"),
        (ASK | {"skill": "detct"}, "did you mean 'detect'?"),
        (ASK | {"answers": []}, "has 0 answers; 1 to 10"),
        (ASK | {"answers": ["a"] * 11}, "has 11 answers; 1 to 10"),
        (ASK | {"question": " "}, "asks nothing"),
        ({"image": "a", "question": "Q"}, "query needs 'answers'"),
        ({"image": "a", "answers": ["a"]}, "query needs 'question'"),
        (ASK | {"skill": "caption"}, "caption has no use for 'question'"),
        (ASK | {"boxes": [[0, 0, 1, 1]]}, "query has no use for 'boxes'"),
        ({"image": "a", "skill": "detect", "object": "x"}, "detect needs 'boxes'"),
        ({"image": "a", "skill": "point", "object": "x"}, "point needs 'boxes' or 'points'"),
        ({"image": "a", "skill": "detect", "object": "x", "question": "y", "boxes": []}, "not both"),
        ({"image": "a", "skill": "detect", "object": "x", "boxes": [[0, 0, 1]]}, "must have 4 items, not 3"),
        ({"image": "a", "skill": "detect", "object": "x", "boxes": [[10, 20, 30, 40]]}, "fractions"),
        ({"image": "a", "skill": "detect", "object": "x", "boxes": [[0.5, 0, 0.5, 1]]}, "min < max"),
        ({"image": "a", "skill": "point", "object": "x", "points": [[0.5, 1.5]]}, "fractions"),
        (ASK | {"refs": [[0.5]]}, "a point [x, y] or a box"),
        (ASK | {"id": "line1"}, "has the id 'line1' of line 1; ids are unique"),
    ],
)
def test_what_is_refused(write, line, told):
    with pytest.raises(UsageError) as error:
        read_jsonl(write(ASK, line))
    assert told in str(error.value)
    assert "set.jsonl line 2" in str(error.value)


def test_files_that_are_none(write, tmp_path):
    with pytest.raises(UsageError, match="holds no questions"):
        read_jsonl(write(b""))
    with pytest.raises(UsageError, match="there is no question file"):
        open_dataset(str(tmp_path / "none.jsonl"))
    with pytest.raises(UsageError, match="Is a directory"):
        open_dataset(str(tmp_path))
    with pytest.raises(UsageError, match="has 1 pictures, not 2"):
        open_dataset(str(write(ASK)), 2)


def test_pictures_are_looked_at_before_a_model_is(write):
    with pytest.raises(ImageError, match=r"there is no picture .*a\.png"):
        evaluate(["no-such-model"], write(ASK))


def test_pictures_belong_to_the_digest(write, tmp_path):
    """Changed, missing, or something that would never end; also those that are not taken."""
    path = write(ASK, ASK | {"image": "b.png"})
    found = [read_jsonl(path)[0]]
    for content in (b"one", b"two"):
        (tmp_path / "b.png").write_bytes(content)
        os.utime(tmp_path / "b.png", ns=(0, len(found)))  # clocks of disks are coarse
        found.append(open_dataset(str(path), 1).digest)
    assert len(set(found)) == 3
    assert read_jsonl(path)[0] == found[2]
    (tmp_path / "b.png").unlink()
    os.mkfifo(tmp_path / "b.png")
    assert read_jsonl(path)[0] == found[0]
    assert read_jsonl(write(ASK | {"image": "a\0b"}))[1]


class Told(Progress):
    """Remembers the stages and counts the steps."""

    def __init__(self):
        self.stages, self.steps = [], 0

    def stage(self, text, total=None):
        self.stages.append((text, total))

    def advance(self, steps):
        self.steps += steps


def test_reading_many_pictures_is_shown(write):
    few, many = Told(), Told()
    read_jsonl(write(ASK), few)
    read_jsonl(write(*(ASK | {"image": f"{n}.png"} for n in range(MANY))), many)
    assert (few.stages, few.steps) == ([], 0)
    assert (many.stages, many.steps) == ([(f"reading {MANY} pictures", MANY)], MANY)
