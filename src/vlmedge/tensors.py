"""Lazy tensors: a name, a shape and a way to read rows as float32; nothing is read before it is asked for."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from vlmedge.session import F32
from vlmedge.spec import Shape

BLOCK_ELEMENTS = 4 << 20  # 16 MiB of float32: large enough to be fast, small beside any model


class Tensor(ABC):
    """A matrix (or vector) that can be read in blocks of rows.

    `shape` is the logical shape, `dtype` the stored one ("f32", "f16", "bf16"). The first axis counts rows;
    a vector is one row.
    """

    shape: Shape
    dtype: str

    @property
    def rows(self) -> int:
        """Rows: the first axis of anything with two or more axes, 1 for a vector."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def columns(self) -> int:
        """Elements of one row."""
        return self.size // self.rows if self.rows else 0

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @abstractmethod
    def read_rows(self, start: int, stop: int) -> F32:
        """Rows start..stop as float32 [stop - start, columns]."""

    def read(self) -> F32:
        """The whole tensor as float32 in its shape."""
        return self.read_rows(0, self.rows).reshape(self.shape)

    def blocks(self, elements: int = BLOCK_ELEMENTS) -> Iterator[F32]:
        """The rows in order, in float32 blocks of about `elements` elements."""
        step = max(1, elements // max(1, self.columns))
        for start in range(0, self.rows, step):
            yield self.read_rows(start, min(start + step, self.rows))


class ArrayTensor(Tensor):
    """A tensor that is already in memory."""

    def __init__(self, array: F32, dtype: str = "f32") -> None:
        self.array = np.ascontiguousarray(array, dtype=np.float32)
        self.shape = tuple(int(n) for n in array.shape)
        self.dtype = dtype

    def read_rows(self, start: int, stop: int) -> F32:
        """Rows start..stop as float32."""
        return self.array.reshape(self.rows, -1)[start:stop]


class RowSlice(Tensor):
    """Rows `start..stop` of another tensor, in a shape of their own."""

    def __init__(self, base: Tensor, start: int, stop: int) -> None:
        self._base, self._start = base, start
        self.shape = (stop - start, *base.shape[1:])
        self.dtype = base.dtype

    def read_rows(self, start: int, stop: int) -> F32:
        """Rows start..stop as float32."""
        if len(self.shape) == 1:  # a slice of a vector is one row of its elements
            whole = self._base.read_rows(0, 1)
            return whole[:, self._start : self._start + self.shape[0]]
        return self._base.read_rows(self._start + start, self._start + stop)


class Reshaped(Tensor):
    """Another tensor in another shape; the order of elements stays."""

    def __init__(self, base: Tensor, shape: Shape) -> None:
        self._base = base
        self.shape = shape
        self.dtype = base.dtype

    def read_rows(self, start: int, stop: int) -> F32:
        """Rows start..stop as float32."""
        if self.rows == self._base.rows:
            return self._base.read_rows(start, stop)
        return self._base.read().reshape(self.rows, -1)[start:stop]
