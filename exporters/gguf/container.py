"""A GGUF file whose tensors are written in any order, in blocks, by several threads, into their final places."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from vlmedge.exporters.gguf.layout import Stored
from vlmedge.session import U8

if TYPE_CHECKING:
    from gguf import GGUFWriter


class Value16(int):
    """A whole number that is stored as uint16."""


class ValueI32(int):
    """A whole number that is stored as int32."""


Value: TypeAlias = str | int | float | bool | list[str] | list[int] | list[float]
Metadata: TypeAlias = Mapping[str, Value]

_POSITIONAL = hasattr(os, "pwrite")  # Windows has none


class GgufFile:
    """Header and metadata at once, tensors by `write`. Same input, same bytes, whatever the order of the writes.

    `gguf.GGUFWriter` writes the header; its own tensor writer holds or rereads whole tensors, so data goes past it.
    """

    def __init__(self, path: Path, metadata: Metadata, tensors: Sequence[Stored]) -> None:
        import gguf  # not needed for a plan

        self.path = path
        writer = gguf.GGUFWriter(None, str(metadata["general.architecture"]))
        for key, value in metadata.items():
            if key != "general.architecture":
                _add(writer, key, value)
        for t in tensors:
            kind = gguf.GGMLQuantizationType(t.kind.number)
            writer.add_tensor_info(t.tensor, t.shape, None, t.bytes, raw_dtype=kind)
        try:
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()
        self._place(tensors, writer.data_alignment)

    def _place(self, tensors: Sequence[Stored], alignment: int) -> None:
        """Give every tensor its offset and the file its full size; what is never written reads as zero."""
        position = _aligned(self.path.stat().st_size, alignment)
        self._offsets: dict[str, int] = {}
        for t in tensors:
            self._offsets[t.tensor] = position
            position += _aligned(t.bytes, alignment)
        self._fd = os.open(self.path, os.O_WRONLY | getattr(os, "O_BINARY", 0))
        self._lock = threading.Lock()
        os.ftruncate(self._fd, position)

    def write(self, stored: Stored, row: int, data: U8) -> None:
        """Write encoded rows from `row` on."""
        offset = self._offsets[stored.tensor] + row * stored.kind.size((1, stored.columns))
        view = data.data
        while view:
            wrote = self._some(view, offset)
            view, offset = view[wrote:], offset + wrote

    def _some(self, view: memoryview, offset: int) -> int:
        if _POSITIONAL:
            return os.pwrite(self._fd, view, offset)
        with self._lock:
            os.lseek(self._fd, offset, os.SEEK_SET)
            return os.write(self._fd, view)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def _aligned(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment


def _add(writer: GGUFWriter, key: str, value: Value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, Value16):
        writer.add_uint16(key, value)
    elif isinstance(value, ValueI32):
        writer.add_int32(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
