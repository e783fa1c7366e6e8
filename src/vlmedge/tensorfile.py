"""Reading safetensors files without trusting them: header first, rows on demand, no second copy.

The `safetensors` package cannot give bf16 to numpy and maps whole files into memory; exporting needs neither.
Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from vlmedge.errors import CheckpointError
from vlmedge.session import F32
from vlmedge.spec import Shape
from vlmedge.tensors import Tensor

DTYPES = {"F32": ("f32", 4), "F16": ("f16", 2), "BF16": ("bf16", 2)}
_HEADER_LIMIT = 100 << 20  # the format's own limit


class FileTensor(Tensor):
    """A tensor inside an open file; rows are read with pread, so nothing stays resident."""

    def __init__(self, file: OpenFile, name: str, dtype: str, shape: Shape, offset: int) -> None:
        self.file, self.name, self.dtype, self.shape, self.offset = file, name, dtype, shape, offset

    def read_rows(self, start: int, stop: int) -> F32:
        """Rows start..stop as float32."""
        width = 4 if self.dtype == "f32" else 2
        count = (stop - start) * self.columns
        raw = self.file.read(self.offset + start * self.columns * width, count * width)
        if self.dtype == "bf16":
            wide = np.empty(count, np.uint32)
            np.left_shift(np.frombuffer(raw, np.uint16), 16, out=wide, dtype=np.uint32, casting="unsafe")
            flat = wide.view(np.float32)
        else:
            flat = np.frombuffer(raw, np.float32 if self.dtype == "f32" else np.float16).astype(np.float32, copy=False)
        return flat.reshape(stop - start, self.columns)


class OpenFile:
    """A file that stays open as long as one of its tensors is alive."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self.size = os.fstat(self._fd).st_size

    def read(self, offset: int, count: int) -> bytearray:
        """Read exactly `count` bytes at `offset`."""
        buffer = bytearray(count)
        view, done = memoryview(buffer), 0
        while done < count:
            got = os.preadv(self._fd, [view[done : done + (1 << 30)]], offset + done)
            if got <= 0:
                raise CheckpointError(f"{self.path.name} ends in the middle of its data; download it again")
            done += got
        return buffer

    def __del__(self) -> None:
        """Close the descriptor."""
        fd = getattr(self, "_fd", None)
        if fd is not None:
            os.close(fd)


def open_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the file's tensors in the order of their data.

    Raises CheckpointError for a truncated file, a header that is not JSON, and offsets that leave the data,
    overlap or disagree with shape and dtype.
    """
    file = OpenFile(path)
    header, start = _header(file)
    tensors: dict[str, Tensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, begin, end = _entry(path, name, entry)
        if end > file.size - start:
            raise CheckpointError(
                f"{path.name} is truncated: {name!r} ends at byte {start + end}, the file has {file.size}; download it again"
            )
        spans.append((begin, end, name))
        tensors[name] = FileTensor(file, name, dtype, shape, start + begin)
    spans.sort()
    for (_, end, first), (begin, _, second) in zip(spans, spans[1:], strict=False):
        if begin < end:
            raise CheckpointError(f"{path.name} is damaged: the data of {first!r} and {second!r} overlap")
    if spans and spans[-1][1] != file.size - start:
        raise CheckpointError(f"{path.name} is damaged: {file.size - start} bytes of data, the header describes {spans[-1][1]}")
    return {name: tensors[name] for _, _, name in spans}


def _header(file: OpenFile) -> tuple[dict[str, Any], int]:
    if file.size < 8:
        raise CheckpointError(f"{file.path.name} is not a safetensors file: only {file.size} bytes")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > _HEADER_LIMIT or 8 + length > file.size:
        raise CheckpointError(
            f"{file.path.name} is truncated or no safetensors file: its header claims {length} bytes of {file.size}"
        )
    try:
        header = json.loads(bytes(file.read(8, length)))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.path.name} has a damaged header: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file.path.name} has a damaged header: not a table")
    return header, 8 + length


def _entry(path: Path, name: str, entry: Any) -> tuple[str, Shape, int, int]:
    try:
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        whole = False
        kind, shape, begin, end = "", (), 0, 0
    if not whole:
        raise CheckpointError(f"{path.name} has a damaged header: the entry of {name!r} is not a dtype, a shape and offsets")
    if kind not in DTYPES:
        raise CheckpointError(f"{path.name}: {name!r} has the dtype {kind}; weights must be {', '.join(DTYPES)}")
    dtype, width = DTYPES[kind]
    if end - begin != math.prod(shape) * width:
        raise CheckpointError(
            f"{path.name} is damaged: {name!r} of shape {list(shape)} in {kind} needs {math.prod(shape) * width} bytes, "
            f"its offsets hold {end - begin}"
        )
    return dtype, shape, begin, end
