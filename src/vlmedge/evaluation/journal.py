"""Answers on disk: one append-only file per model and shard, a line per question, that survives a kill anywhere."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from vlmedge.errors import OutputError
from vlmedge.evaluation.row import Row, read_row
from vlmedge.jsonlines import JsonLines, appending, parse_line, whole_lines, writing
from vlmedge.records import decode

SCHEMA = "vlmedge.answers/1"
_HEX = 12  # digits of a hash in a file name
_KEPT = "answers"  # in messages: what the lines are


@dataclass(frozen=True, slots=True)
class Asked:
    """The first line of a journal: which model was asked what, and how. Answers of unlike ones are never mixed.

    `model` and `data` are hashes (`subject.fingerprint`, `Dataset.digest`); `max_tokens` 0 is the model's own limit.
    """

    schema: str
    label: str
    model: str
    data: str
    runtime: str
    dtype: str
    max_tokens: int


class Journal:
    """The answers of one model to one shard, opened for more of them; `rows` are those that it holds, by id."""

    def __init__(self, lines: JsonLines, rows: dict[str, Row]) -> None:
        self.path = lines.path
        self.rows = rows
        self._lines = lines
        self._picture = ""

    def add(self, row: Row) -> None:
        """Write a row, unless its question is answered already; a picture's rows are on the disk when the next begins.

        Raises OutputError where it cannot be written.
        """
        if row.id in self.rows:
            return
        if self._picture not in ("", row.picture):
            self._lines.flush()
        self._picture = row.picture
        self._lines.append(row.as_dict())
        self.rows[row.id] = row


def journal_path(folder: Path, asked: Asked, index: int, count: int) -> Path:
    """Where the answers of a shard belong."""
    return folder / f"{_stem(asked)}.{index}-of-{count}.jsonl"


@contextmanager
def opened(path: Path, asked: Asked) -> Iterator[Journal]:
    """Open a journal to go on with it, or begin it. A last line that a kill cut short is removed.

    Raises OutputError where another process has it open (not noticed on Windows), where it was made with another
    model, question set or settings, or is damaged, or cannot be written.
    """
    with appending(path, "evaluation", _KEPT) as lines:
        if not lines.found:
            lines.append(asdict(asked))
        yield Journal(lines, _rows(path, lines.found, asked))


def answered(folder: Path, asked: Asked, besides: Path) -> dict[str, Row]:
    """What the other journals of the same model in the folder hold; a line that is being written is left out."""
    rows: dict[str, Row] = {}
    for path in sorted(folder.glob(f"*-{asked.model[:_HEX]}.*-of-*.jsonl")):
        if path != besides:
            with writing(path, _KEPT):
                lines = whole_lines(path)
            rows |= _rows(path, lines, asked)
    return rows


def _rows(path: Path, lines: Sequence[bytes], asked: Asked) -> dict[str, Row]:
    if not lines:
        return {}
    _check(path, decode(Asked, parse_line(lines[0], f"{path} line 1"), f"{path} line 1", OutputError), asked)
    rows: dict[str, Row] = {}
    for number, line in enumerate(lines[1:], 2):
        where = f"{path} line {number}"
        row = read_row(parse_line(line, where), where)
        if rows.setdefault(row.id, row) is not row:
            raise OutputError(f"{where} answers '{row.id}' again; remove the line, or choose another --out")
    return rows


def _check(path: Path, found: Asked, asked: Asked) -> None:
    """Raise OutputError for answers of another model, set or way of asking."""
    if found.schema != SCHEMA:
        raise OutputError(f"{path} has the schema '{found.schema[:40]}', this version reads {SCHEMA}; remove it")
    what = {
        "model": "another model (its files have changed)",
        "data": "another question set (its file or a picture has changed)",
    }
    for key in ("model", "data", "runtime", "dtype", "max_tokens"):
        if getattr(found, key) != getattr(asked, key):
            other = what.get(key, f"{key} {getattr(found, key) or 'by default'}, not {getattr(asked, key)}")
            raise OutputError(f"{path} holds answers made with {other}; remove it, or choose another --out")


def _stem(asked: Asked) -> str:
    """Readable, then a piece of the model's hash: one model has one name wherever it lies, another has another."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", asked.label).strip("-.")[-60:]
    return f"{readable}-{asked.model[:_HEX]}"
