"""Stored arrays as lazy tensors: the forms in which ONNX operators read a matrix, dequantized row by row.

The inverse of packing.py and of grids.py, written from the operators' definitions and not from either of them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vlmedge.exporters.onnx.opened import StoredArray, nibbles
from vlmedge.session import F32, U8
from vlmedge.spec import Shape
from vlmedge.tensors import Tensor


class StoredFloats(Tensor):
    """A tensor of any shape in f32 or f16."""

    def __init__(self, array: StoredArray) -> None:
        self._array, self.shape = array, array.shape
        self.dtype = "f16" if array.type == "FLOAT16" else "f32"

    def read_rows(self, start: int, stop: int) -> F32:
        """Rows start..stop as float32."""
        if len(self.shape) < 2:
            start, stop = 0, self.size
        values: F32 = self._array.rows(start, stop).astype(np.float32, copy=False)
        return values.reshape(-1, self.columns)


class StoredRows(Tensor):
    """A matrix [n, k] of unsigned codes, row after row: value = (code - zero) * scale.

    `codes`: UINT8 [n, ...], a row of whole blocks, at 4 bits two to a byte and the first one low. `scales`
    [n, blocks]. `zeros`: UINT8 [n, ...], packed as codes are, or None: the middle of the codes.
    Definition: MatMulNBits, https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
    """

    dtype = "f32"

    def __init__(
        self, shape: Shape, bits: int, block: int, codes: StoredArray, scales: StoredArray, zeros: StoredArray | None
    ) -> None:
        self.shape, self._bits, self._block = shape, bits, block
        self._codes, self._scales, self._zeros = codes, scales, zeros

    def read_rows(self, start: int, stop: int) -> F32:
        """Rows start..stop as float32; the last block's padding is cut off."""
        n, groups = stop - start, -(-self.shape[1] // self._block)
        values = self._unpacked(self._codes, start, stop).astype(np.float32).reshape(n, groups, self._block)
        if self._zeros is None:
            values -= np.float32(1 << (self._bits - 1))
        else:
            values -= self._unpacked(self._zeros, start, stop)[:, :groups, None]
        _scaled(values, self._scales.rows(start, stop))
        return values.reshape(n, -1)[:, : self.shape[1]]

    def _unpacked(self, array: StoredArray, start: int, stop: int) -> U8:
        codes = array.rows(start, stop).reshape(stop - start, -1)
        return nibbles(codes) if self._bits == 4 else codes


class StoredColumns(Tensor):
    """A matrix [n, k] that is stored transposed, [k, n]: value = (code - zero) * scale.

    `scales` [blocks, n], or [n] where a block is a whole row; `zeros` [blocks, n], or None: zero is 0.
    Definition: DequantizeLinear with axis 0, https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html
    """

    dtype = "f32"

    def __init__(
        self, shape: Shape, block: int, codes: StoredArray, scales: StoredArray, zeros: StoredArray | None
    ) -> None:
        self.shape, self._block = shape, block
        self._codes, self._scales, self._zeros = codes, scales, zeros

    def read_rows(self, start: int, stop: int) -> F32:
        """Rows start..stop as float32."""
        n, k, groups = stop - start, self.shape[1], -(-self.shape[1] // self._block)
        values = np.zeros((n, groups, self._block), np.float32)
        flat = values.reshape(n, -1)
        flat[:, :k] = np.ascontiguousarray(self._codes.columns(start, stop).T)
        if self._zeros is not None:
            values -= self._zeros.columns(start, stop).T[:, :, None]
        whole = len(self._scales.shape) == 1
        scales = self._scales.rows(start, stop)[None] if whole else self._scales.columns(start, stop)
        _scaled(values, scales.T)
        return flat[:, :k]


def _scaled(values: F32, scales: npt.NDArray[np.floating]) -> None:
    """Multiply blocks [n, blocks, block] by their scales [n, blocks]; damaged ones give NaN and infinity, silently."""
    with np.errstate(invalid="ignore", over="ignore"):
        values *= scales.astype(np.float32)[:, :, None]
