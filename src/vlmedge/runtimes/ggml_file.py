"""A GGUF file mapped into memory: where each tensor's bytes lie; nothing is read before it is used."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from vlmedge.errors import BundleError
from vlmedge.session import U8

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_AGAIN = "copy or export it again"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file. `shape` is in ggml's order: the first entry is the length of a row."""

    name: str
    type: int
    shape: tuple[int, ...]
    offset: int
    bytes: int


class GgufFile:
    """The header of a GGUF file and its mapped bytes.

    `tensors`: name -> StoredTensor. `metadata`: the values that are numbers, booleans or strings; arrays are left out.
    """

    def __init__(self, path: Path) -> None:
        """Map and check `path`; raises BundleError for a file that is missing, not GGUF, truncated or malformed."""
        self.path = path
        self.data: U8 = _map(path)
        try:
            self._read_header()
        except (struct.error, UnicodeDecodeError, OverflowError, MemoryError):
            raise BundleError(f"{path} is damaged: its header ends or errs early; {_AGAIN}") from None

    def address(self, tensor: StoredTensor) -> int:
        """Where the tensor's bytes are in memory, as long as this object lives."""
        return int(self.data.ctypes.data) + tensor.offset

    def __getitem__(self, name: str) -> StoredTensor:
        """The tensor of that name; raises BundleError where the file has none."""
        if name not in self.tensors:
            raise BundleError(f"{self.path} has no tensor {name}; export it again")
        return self.tensors[name]

    def _read_header(self) -> None:
        at = _Cursor(self.data)
        magic, version, tensors, values = at.read("<4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise BundleError(f"{self.path} is not a GGUF file of version 2 or 3; {_AGAIN}")
        self.metadata = dict(at.values(values))
        headers = [at.tensor() for _ in range(tensors)]
        alignment = int(self.metadata.get("general.alignment", 32)) or 32
        start = -(-at.position // alignment) * alignment
        self.tensors = {name: self._stored(name, kind, shape, start + at) for name, kind, shape, at in headers}

    def _stored(self, name: str, kind: int, shape: tuple[int, ...], offset: int) -> StoredTensor:
        block = _block_sizes().get(kind)
        if block is None or not shape or shape[0] % block[0]:
            raise BundleError(f"{self.path}: tensor {name} of shape {list(shape)} has the unknown type {kind}")
        size = prod(shape) // block[0] * block[1]
        if offset + size > len(self.data):
            raise BundleError(
                f"{self.path} is truncated: {len(self.data):,} bytes, where tensor {name} ends at "
                f"{offset + size:,}; {_AGAIN}"
            )
        return StoredTensor(name, kind, shape, offset, size)


class _Cursor:
    """Reads the header's little-endian values one after the other."""

    def __init__(self, data: U8) -> None:
        self._data = memoryview(data.data)
        self.position = 0

    def read(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self._data, self.position)
        self.position += struct.calcsize(layout)
        return values

    def string(self) -> str:
        (length,) = self.read("<Q")
        (text,) = self.read(f"<{length}s")
        return str(text, "utf-8")

    def values(self, count: int) -> Iterator[tuple[str, Any]]:
        for _ in range(count):
            name, (kind,) = self.string(), self.read("<I")
            if kind == _ARRAY:
                self._skip_array()
            else:
                yield name, self.string() if kind == _STRING else self.read(_layout(kind))[0]

    def tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name, (axes,) = self.string(), self.read("<I")
        if axes > 4:
            raise struct.error("more than four axes")
        shape, (kind, offset) = self.read(f"<{axes}Q"), self.read("<IQ")
        return name, kind, shape, offset

    def _skip_array(self) -> None:
        kind, count = self.read("<IQ")
        if kind != _STRING:
            self.position += count * struct.calcsize(_layout(kind))
            return
        position, length = self.position, struct.Struct("<Q")
        for _ in range(count):  # vocabularies: 100,000 strings and more, so no call per string
            position += 8 + length.unpack_from(self._data, position)[0]
        self.position = position


def _map(path: Path) -> U8:
    try:
        return np.memmap(path, np.uint8, mode="r")
    except FileNotFoundError:
        raise BundleError(f"{path} is missing; {_AGAIN}") from None
    except ValueError:
        raise BundleError(f"{path} is empty; {_AGAIN}") from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from None


def _layout(kind: int) -> str:
    if kind not in _SCALARS:
        raise struct.error(f"unknown value type {kind}")
    return _SCALARS[kind]


def _block_sizes() -> dict[int, tuple[int, int]]:
    """ggml_type -> (elements, bytes) of a block."""
    from gguf.constants import GGML_QUANT_SIZES

    return {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
