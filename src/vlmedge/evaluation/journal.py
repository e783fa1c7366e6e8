"""Answers on disk: one append-only file per model and shard, a line per question, that survives a kill anywhere."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlmedge.errors import OutputError
from vlmedge.evaluation.row import Row, read_row
from vlmedge.records import decode
from vlmedge.staging import lock

SCHEMA = "vlmedge.answers/1"
_HEX = 12  # digits of a hash in a file name


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

    def __init__(self, path: Path, handle: int, rows: dict[str, Row]) -> None:
        self.path = path
        self.rows = rows
        self._handle = handle
        self._picture = ""

    def add(self, row: Row) -> None:
        """Write a row, unless its question is answered already; a picture's rows are on the disk when the next begins.

        Raises OutputError where it cannot be written.
        """
        if row.id in self.rows:
            return
        with _writing(self.path):
            if self._picture not in ("", row.picture):
                os.fsync(self._handle)
            self._picture = row.picture
            _write(self._handle, row.as_dict())
        self.rows[row.id] = row

    def close(self) -> None:
        """Flush it to the disk and give the lock back."""
        try:
            with _writing(self.path):
                os.fsync(self._handle)
        finally:
            os.close(self._handle)


def journal_path(folder: Path, asked: Asked, index: int, count: int) -> Path:
    """Where the answers of a shard belong."""
    return folder / f"{_stem(asked)}.{index}-of-{count}.jsonl"


@contextmanager
def opened(path: Path, asked: Asked) -> Iterator[Journal]:
    """Open a journal to go on with it, or begin it. A last line that a kill cut short is removed.

    Raises OutputError where another process has it open (not noticed on Windows), where it was made with another
    model, question set or settings, or is damaged, or cannot be written.
    """
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o644)
    journal = None
    try:
        with _writing(path):
            if not lock(handle):
                raise OutputError(f"another evaluation is writing {path}; wait for it or choose another --out")
            data = path.read_bytes()
            whole = data.rfind(b"\n") + 1
            os.ftruncate(handle, whole)
            if not whole:
                _write(handle, asdict(asked))
            rows = _rows(path, data[:whole], asked) if whole else {}
        journal = Journal(path, handle, rows)
        yield journal
    finally:
        journal.close() if journal is not None else os.close(handle)


def answered(folder: Path, asked: Asked, besides: Path) -> dict[str, Row]:
    """What the other journals of the same model in the folder hold; a line that is being written is left out."""
    rows: dict[str, Row] = {}
    for path in sorted(folder.glob(f"*-{asked.model[:_HEX]}.*-of-*.jsonl")):
        if path != besides:
            with _writing(path):
                data = path.read_bytes()
            rows |= _rows(path, data[: data.rfind(b"\n") + 1], asked)
    return rows


def _rows(path: Path, data: bytes, asked: Asked) -> dict[str, Row]:
    lines = data.splitlines()
    if not lines:
        return {}
    _check(path, decode(Asked, _json(lines[0], f"{path} line 1"), f"{path} line 1", OutputError), asked)
    rows: dict[str, Row] = {}
    for number, line in enumerate(lines[1:], 2):
        where = f"{path} line {number}"
        row = read_row(_json(line, where), where)
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


def _json(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise OutputError(f"{where} is damaged; remove the file, or choose another --out") from None


def _write(handle: int, data: Any) -> None:
    """One line in one go, so far as the system lets it."""
    left = (json.dumps(data, allow_nan=False) + "\n").encode()
    while left:
        left = left[os.write(handle, left) :]


def _stem(asked: Asked) -> str:
    """Readable, then a piece of the model's hash: one model has one name wherever it lies, another has another."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", asked.label).strip("-.")[-60:]
    return f"{readable}-{asked.model[:_HEX]}"


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"the disk of {path.parent} is full; free some space: the answers so far are kept"
            ) from None
        reason = error.strerror or str(error)
        raise OutputError(f"{path} cannot be written: {reason}; choose another --out") from None
