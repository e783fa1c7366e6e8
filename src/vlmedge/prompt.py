"""From a template and a question to segments: token ids, picture spans and slots for given coordinates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, assert_never

from vlmedge.errors import CheckpointError, UnsupportedError, UsageError, nearest
from vlmedge.spec import Coordinate, Ids, Image, Part, PromptSpec, References, Text

if TYPE_CHECKING:
    import tokenizers

Point: TypeAlias = tuple[float, float]
Reference: TypeAlias = "tuple[float, float] | tuple[float, float, float, float]"


@dataclass(frozen=True, slots=True)
class TokenRun:
    """Token ids in a row."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PictureSpan:
    """The place of one picture; `index` counts the request's pictures."""

    index: int


@dataclass(frozen=True, slots=True)
class Slot:
    """One position filled by a region encoder: a coordinate (one value) or a size (width, height)."""

    values: tuple[float, ...]


Segment: TypeAlias = "TokenRun | PictureSpan | Slot"


class Tokenizer:
    """A tokenizer.json."""

    def __init__(self, content: bytes) -> None:
        """Parse the file's bytes; raises CheckpointError where they are no tokenizer."""
        import tokenizers

        self.content = content
        try:
            self._tokenizer: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the Rust library raises bare Exception, nothing narrower
            raise CheckpointError(f"tokenizer.json cannot be read: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Text to token ids, with the special tokens that the file itself adds.

        Raises UsageError for a lone surrogate, which is no character.
        """
        try:
            return list(self._tokenizer.encode(text).ids)
        except TypeError:  # of the Rust library, for a str that has no UTF-8
            raise UsageError(f"a text holds a character that is none (a lone surrogate): {text!r:.80}") from None

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids to text; special tokens are left out, ids beyond the vocabulary too."""
        return str(self._tokenizer.decode(list(ids)))


def template(prompt: PromptSpec, name: str) -> tuple[Part, ...]:
    """The template of a skill; raises UnsupportedError with what the model has instead."""
    if name in prompt.templates:
        return prompt.templates[name]
    skill = name.partition("/")[0]
    siblings = [known for known in prompt.templates if known.partition("/")[0] == skill]
    if siblings:
        raise UnsupportedError(f"this model has no '{name}'{nearest(name, siblings)}")
    raise UnsupportedError(f"this model has no skill '{skill}'{nearest(skill, skills(prompt))}")


def skills(prompt: PromptSpec) -> tuple[str, ...]:
    """The skills that the prompt has templates for."""
    return tuple(dict.fromkeys(name.partition("/")[0] for name in prompt.templates))


def render(
    prompt: PromptSpec,
    name: str,
    tokenizer: Tokenizer,
    *,
    pictures: int = 1,
    question: str = "",
    thing: str = "",
    references: Sequence[Reference] = (),
    eye: Point | None = None,
) -> list[Segment]:
    """Fill a template. Text is tokenized part by part, as upstream does; neighbouring ids are joined."""
    out: list[Segment] = []
    for part in template(prompt, name):
        if isinstance(part, Ids):
            _extend(out, part.ids)
        elif isinstance(part, Text):
            _extend(out, tokenizer.encode(_filled(part.text, {"{question}": question, "{object}": thing})))
        elif isinstance(part, Image):
            out += [PictureSpan(index) for index in range(pictures)]
        elif isinstance(part, References):
            out += [slot for reference in references for slot in _slots(reference)]
        elif isinstance(part, Coordinate):
            assert eye is not None, "a template with coordinates is rendered with them"
            out.append(Slot((eye[0] if part.axis == "x" else eye[1],)))
        else:
            assert_never(part)
    return out


def _filled(text: str, given: dict[str, str]) -> str:
    """Fill the places in one pass, so that what a user writes is never taken for a place."""
    return re.sub("|".join(given), lambda found: given[found[0]], text)


def _extend(out: list[Segment], ids: Sequence[int]) -> None:
    last = out[-1] if out else None
    if isinstance(last, TokenRun):
        out[-1] = TokenRun((*last.ids, *ids))
    elif ids:
        out.append(TokenRun(tuple(ids)))


def _slots(reference: Reference) -> list[Slot]:
    """A point is two coordinates; a box its centre and then its size."""
    if len(reference) == 2:
        return [Slot((reference[0],)), Slot((reference[1],))]
    x0, y0, x1, y1 = reference
    return [Slot(((x0 + x1) / 2,)), Slot(((y0 + y1) / 2,)), Slot((x1 - x0, y1 - y0))]


class TextStream:
    """Turns token ids into text as they come; holds back what is not yet a whole character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # first id of the window that is decoded again, so that blanks between tokens are right
        self._read = 0  # ids whose text is out

    def push(self, token: int) -> str:
        """Add one token; return the text that can be shown now, possibly empty."""
        self._ids.append(token)
        before = self._tokenizer.decode(self._ids[self._start : self._read])
        now = self._tokenizer.decode(self._ids[self._start :])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def finish(self) -> str:
        """Return what was held back: bytes that never became a character."""
        before = self._tokenizer.decode(self._ids[self._start : self._read])
        rest = self._tokenizer.decode(self._ids[self._start :])[len(before) :]
        self._start = self._read = len(self._ids)
        return rest
