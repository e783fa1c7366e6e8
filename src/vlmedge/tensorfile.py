"""Reading safetensors files without trusting them: header first, rows on demand, no second copy.

The `safetensors` package cannot give bf16 to numpy and maps whole files into memory; exporting needs neither.
Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
import operator
import os
import stat
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vlmedge.errors import CheckpointError
from vlmedge.session import F32
from vlmedge.spec import Shape
from vlmedge.tensors import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = {"F32": ("f32", 4), "F16": ("f16", 2), "BF16": ("bf16", 2)}
# Legal in the format, and met in buffers that a weight table drops; read as weights they are refused.
OTHERS = dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1) | dict.fromkeys(("U16", "I16"), 2)
OTHERS |= dict.fromkeys(("U32", "I32"), 4) | dict.fromkeys(("U64", "I64", "F64", "C64"), 8)
_NUMPY: dict[str, np.dtype[Any]] = {"f32": np.dtype("<f4"), "f16": np.dtype("<f2"), "bf16": np.dtype("<u2")}
_HEADER_LIMIT = 100_000_000  # the format's own limit
_RANK_LIMIT = 16
_READ = 1 << 30  # Linux gives at most 2 GiB to one call
_POSITIONAL = hasattr(os, "preadv")  # Windows has none


class FileTensor(Tensor):
    """A tensor inside an open file; rows are read with pread, so nothing stays resident."""

    def __init__(self, file: OpenFile, name: str, dtype: str, shape: Shape, offset: int) -> None:
        self.file, self.name, self.dtype, self.shape, self.offset = file, name, dtype, shape, offset

    def read_rows(self, start: int, stop: int) -> F32:
        """Rows start..stop as float32; raises CheckpointError for a dtype that holds no weights."""
        stored = _NUMPY.get(self.dtype)
        if stored is None:
            raise CheckpointError(
                f"{self.file.path.name}: {short(self.name)} has the dtype {self.dtype.upper()}; "
                f"weights must be {', '.join(FLOATS)}"
            )
        count = (stop - start) * self.columns
        raw = self.file.read(self.offset + start * self.columns * stored.itemsize, count * stored.itemsize)
        if self.dtype == "bf16":
            wide = np.empty(count, np.uint32)
            np.left_shift(np.frombuffer(raw, stored), 16, out=wide, dtype=np.uint32, casting="unsafe")
            flat: F32 = wide.view(np.float32)
        else:
            flat = np.frombuffer(raw, stored).astype(np.float32, copy=False)
        return flat.reshape(stop - start, self.columns)


class OpenFile:
    """A file that stays open as long as one of its tensors is alive; several threads may read it at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
                raise CheckpointError(f"{path} is not a file")
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from None
        _close_with(self, self._fd)
        self.size = os.fstat(self._fd).st_size

    def read(self, offset: int, count: int) -> bytearray:
        """Read exactly `count` bytes at `offset`; raises CheckpointError where the file ends or the disk fails."""
        buffer = bytearray(count)
        view, done = memoryview(buffer), 0
        while done < count:
            got = self._some(view[done : done + _READ], offset + done)
            if got <= 0:
                raise CheckpointError(f"{self.path.name} ends in the middle of its data; download it again")
            done += got
        return buffer

    def _some(self, view: memoryview, offset: int) -> int:
        try:
            if _POSITIONAL:
                return os.preadv(self._fd, [view], offset)
            with self._lock:
                os.lseek(self._fd, offset, os.SEEK_SET)
                data = os.read(self._fd, len(view))
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from None
        view[: len(data)] = data
        return len(data)


class _Closing(weakref.ref[OpenFile]):
    """Closes the descriptor of a file that is gone."""

    __slots__ = ("close",)
    close: Callable[[], None]


# By descriptor: one that is given out again takes the place of its dead predecessor.
_CLOSING: dict[int, _Closing] = {}


def _close_with(file: OpenFile, fd: int) -> None:
    """Close a descriptor when the last reference to its file goes; what is open at exit, the system closes.

    No line of Python runs then: a Ctrl-C that arrives in `__del__` or in a callback is printed and lost.
    """
    closing = _Closing(file, operator.methodcaller("close"))
    closing.close = partial(os.close, fd)
    _CLOSING[fd] = closing


def open_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the file's tensors in the order of their data.

    Raises CheckpointError for a truncated file, a header that is not JSON, and offsets that leave the data,
    overlap, leave holes or disagree with shape and dtype.
    """
    file = OpenFile(path)
    header, start = _header(file)
    tensors: dict[str, Tensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, begin, end = _entry(path, name, entry)
        spans.append((begin, end, name))
        tensors[name] = FileTensor(file, name, dtype, shape, start + begin)
    spans.sort()
    _check_spans(file, spans, start)
    return {name: tensors[name] for _, _, name in spans}


def short(name: str) -> str:
    """A name out of a file, quoted and cut to one readable line."""
    return repr(name if len(name) <= 120 else name[:117] + "...")


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON table; raises ValueError where a key stands twice, since two readers may then disagree."""
    table = dict(pairs)
    if len(table) != len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"the key {short(twice)} stands twice")
    return table


def _header(file: OpenFile) -> tuple[dict[str, Any], int]:
    name = file.path.name
    if file.size < 8:
        raise CheckpointError(f"{name} is no safetensors file: it has only {file.size} bytes; download it again")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > _HEADER_LIMIT or 8 + length > file.size:
        raise CheckpointError(
            f"{name} is truncated or no safetensors file: it has {file.size} bytes, "
            f"its header claims {length}; download it again"
        )
    try:
        header = json.loads(file.read(8, length).decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} has a damaged header: {_line(error)}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{name} has a damaged header: it is not a table")
    return header, 8 + length


def _entry(path: Path, name: str, entry: Any) -> tuple[str, Shape, int, int]:
    """The dtype, shape, begin and end of one header entry, consistent with each other."""
    fields = entry if isinstance(entry, dict) else {}
    kind, shape, offsets = fields.get("dtype"), _counts(fields.get("shape")), _counts(fields.get("data_offsets"))
    if not isinstance(kind, str) or shape is None or offsets is None or len(offsets) != 2:
        raise CheckpointError(
            f"{path.name} has a damaged header: the entry of {short(name)} is not a dtype, a shape and two offsets"
        )
    if kind not in FLOATS and kind not in OTHERS:
        raise CheckpointError(
            f"{path.name}: {short(name)} has the unknown dtype {short(kind)}; weights must be {', '.join(FLOATS)}"
        )
    dtype, width = FLOATS.get(kind) or (kind.lower(), OTHERS[kind])
    begin, end = offsets
    wanted = math.prod(shape) * width
    if end - begin != wanted:
        raise CheckpointError(
            f"{path.name} is damaged: {short(name)} of shape {list(shape)} in {kind} needs {wanted:.12g} bytes, "
            f"its offsets hold {end - begin:.12g}"
        )
    return dtype, shape, begin, end


def _counts(value: Any) -> Shape | None:
    """A short list of whole numbers that fit the format's 64 bits, or None."""
    if not isinstance(value, list) or len(value) > _RANK_LIMIT:
        return None
    return tuple(value) if all(type(n) is int and 0 <= n < 1 << 64 for n in value) else None


def _check_spans(file: OpenFile, spans: list[tuple[int, int, str]], start: int) -> None:
    """Check that the sorted (begin, end, name) cover the data exactly once."""
    at, before, size = 0, "", file.size - start
    for begin, end, name in spans:
        if end > size:
            raise CheckpointError(
                f"{file.path.name} is truncated: {short(name)} ends at byte {start + end}, "
                f"the file has {file.size}; download it again"
            )
        if begin < at:
            raise CheckpointError(f"{file.path.name} is damaged: the data of {short(before)} and {short(name)} overlap")
        if begin > at:
            raise CheckpointError(
                f"{file.path.name} is damaged: {begin - at} bytes before {short(name)} belong to nothing"
            )
        at, before = end, name
    if at != size:
        raise CheckpointError(f"{file.path.name} is damaged: {size} bytes of data, the header describes {at}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
