"""Templates become ids, spans and slots; ids become text as they come."""

from pathlib import Path

import pytest

from vlmedge.errors import CheckpointError, UnsupportedError
from vlmedge.prompt import PictureSpan, Slot, TextStream, Tokenizer, TokenRun, render, skills
from vlmedge.spec import Coordinate, Ids, Image, PromptSpec, References, Text

TOKENIZER = Tokenizer((Path(__file__).parent / "data/moondream2/tiny-mha/tokenizer.json").read_bytes())
SPEC = PromptSpec(
    templates={
        "caption/short": (Ids((0,)), Image(), Ids((1, 2))),
        "caption/normal": (Ids((0,)), Image(), Ids((1, 3))),
        "query": (Ids((0,)), Image(), Ids((4,)), References(), Text("{question}"), Ids((3, 3))),
        "gaze": (Ids((0,)), Image(), Text("at"), Coordinate("x"), Coordinate("y")),
    },
    stop=(0,),
    banned=(3,),
    max_tokens=8,
    top_p=0.3,
)


def test_the_picture_stands_between_ids():
    assert render(SPEC, "caption/short", TOKENIZER) == [TokenRun((0,)), PictureSpan(0), TokenRun((1, 2))]


def test_without_a_picture_ids_join():
    assert render(SPEC, "caption/short", TOKENIZER, pictures=0) == [TokenRun((0, 1, 2))]


def test_text_is_tokenized_on_its_own():
    ids = TOKENIZER.encode("What color is the cat?")
    segments = render(SPEC, "query", TOKENIZER, question="What color is the cat?")
    assert segments[2] == TokenRun((4, *ids, 3, 3))


def test_braces_in_a_question_are_text():
    segments = render(SPEC, "query", TOKENIZER, question="{object} {x}", thing="cat")
    assert TOKENIZER.decode(segments[2].ids[1:-2]) == "{object} {x}"


def test_references_become_slots():
    segments = render(SPEC, "query", TOKENIZER, question="?", references=[(0.25, 0.5), (0.0, 0.2, 0.5, 0.6)])
    slots = [s for s in segments if isinstance(s, Slot)]
    assert [s.values for s in slots] == [(0.25,), (0.5,), (0.25,), (0.4,), (0.5, pytest.approx(0.4))]


def test_gaze_has_two_coordinates():
    segments = render(SPEC, "gaze", TOKENIZER, eye=(0.25, 0.75))
    assert segments[-2:] == [Slot((0.25,)), Slot((0.75,))]


def test_skills():
    assert skills(SPEC) == ("caption", "query", "gaze")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("caption/lung", "this model has no 'caption/lung'; did you mean 'caption/"),
        ("query/reasoning", "this model has no 'query/reasoning'"),
        ("detekt", "this model has no skill 'detekt'"),
        ("qeury", "did you mean 'query'"),
    ],
)
def test_what_a_model_lacks(name, words):
    with pytest.raises(UnsupportedError, match=words.replace("?", r"\?")):
        render(SPEC, name, TOKENIZER)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe"])
def test_no_tokenizer(content):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(content)


@pytest.mark.parametrize(
    "text", ["plain words", "naïve café", "中文字符", "emoji 😀👍🏽 end", " leading", "a\n\nb", "tabs\tand  blanks", ""]
)
def test_streamed_pieces_join_to_the_text(text):
    """Bytes of one character may come in several tokens; a piece never holds half of one."""
    stream, ids = TextStream(TOKENIZER), TOKENIZER.encode(text)
    pieces = [stream.push(token) for token in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join([*pieces, stream.finish()]) == TOKENIZER.decode(ids) == text


def test_bytes_that_never_become_a_character_come_at_the_end():
    stream, ids = TextStream(TOKENIZER), TOKENIZER.encode("é")[:1]
    assert [stream.push(token) for token in ids] == [""]
    assert stream.finish() == "\ufffd"
