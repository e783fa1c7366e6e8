"""An append-only file of JSON lines that survives a kill: locked, a line in one go, a cut last line removed."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlmedge.errors import OutputError
from vlmedge.staging import lock


class JsonLines:
    """A file that is open for more lines. `found`: the whole lines that it held when it was opened."""

    def __init__(self, path: Path, handle: int, found: list[bytes], kept: str) -> None:
        self.path = path
        self.found = found
        self._handle = handle
        self._kept = kept

    def append(self, data: Any) -> None:
        """Write a line; `flush` brings it to the disk. Raises OutputError where it cannot be written.

        Then nothing of it is there either: another line may follow when there is space again.
        """
        left = (json.dumps(data, allow_nan=False) + "\n").encode()
        with writing(self.path, self._kept):
            before = os.fstat(self._handle).st_size
            try:
                while left:
                    left = left[os.write(self._handle, left) :]
            except OSError:
                os.ftruncate(self._handle, before)
                raise

    def flush(self) -> None:
        """Return when all lines are on the disk. Raises OutputError where that fails."""
        with writing(self.path, self._kept):
            os.fsync(self._handle)


@contextmanager
def appending(path: Path, writer: str, kept: str) -> Iterator[JsonLines]:
    """Open a file to go on with it, or begin it with its folder; what a kill left of a last line is removed.

    `writer` ("evaluation") and `kept` ("answers") name who writes and what, in messages. Raises OutputError where
    another process has it open (not noticed on Windows), or it cannot be written.
    """
    with writing(path, kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o644)
    try:
        with writing(path, kept):
            if not lock(handle):
                raise OutputError(f"another {writer} is writing {path}; wait for it or choose another --out")
            found = whole_lines(path)
            os.ftruncate(handle, sum(len(line) + 1 for line in found))
        lines = JsonLines(path, handle, found, kept)
        try:
            yield lines
        finally:
            lines.flush()
    finally:
        os.close(handle)


def whole_lines(path: Path) -> list[bytes]:
    """A file's lines, without the last where it has no line break: it is being written, or was cut short."""
    return path.read_bytes().split(b"\n")[:-1]


def parse_line(line: bytes, where: str) -> Any:
    """The JSON data of a line; raises OutputError where it is none. `where` names it in the message."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise OutputError(f"{where} is damaged; remove the file, or choose another --out") from None


@contextmanager
def writing(path: Path, kept: str) -> Iterator[None]:
    """Raise OutputError for what the system says against reading or writing `path`; `kept` ("answers") is in it."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"the disk of {path.parent} is full; free some space: the {kept} so far are kept"
            ) from None
        reason = error.strerror or str(error)
        raise OutputError(f"{path} cannot be written: {reason}; choose another --out") from None
