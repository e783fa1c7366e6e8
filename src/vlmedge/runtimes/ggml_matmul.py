"""Products with weights as they lie in a mapped GGUF file, whatever their type: one small ggml graph per call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from vlmedge.errors import RuntimeFailedError
from vlmedge.runtimes.ggml_file import GgufFile
from vlmedge.runtimes.ggml_library import TYPE_F32, TYPE_I32, Ggml, GgmlTensor
from vlmedge.session import F32, I32

Operation = Callable[[int, int, int], int]


class GgmlMatmuls:
    """ggml's matrix products and row look-ups on the CPU; no weight is copied or dequantized as a whole."""

    def __init__(self, ggml: Ggml, threads: int) -> None:
        """Start a CPU backend of `threads` threads; `close` frees it."""
        self._ggml = ggml
        self._backend = ggml.cpu_backend(threads)

    def linear(self, file: GgufFile, name: str, x: F32, *, bias: bool = True) -> F32:
        """Multiply x float32 [n, in] by `name`.weight^T and add `name`.bias: float32 [n, out]."""
        out = self.product(file, f"{name}.weight", x)
        if bias:
            out += self.vector(file, f"{name}.bias")
        return out

    def product(self, file: GgufFile, name: str, x: F32) -> F32:
        """Multiply x float32 [n, in] by the transpose of a weight [out, in] of any ggml type: float32 [n, out]."""
        x = np.ascontiguousarray(x, np.float32)
        columns, rows = _matrix_shape(file, name)
        if x.shape[1] != columns:
            raise ValueError(f"{name} takes rows of {columns}, not {x.shape[1]}")
        return self._run(self._ggml.mul_mat, file, name, x, TYPE_F32, rows)

    def rows(self, file: GgufFile, name: str, ids: I32) -> F32:
        """Rows `ids` (int32 [n]) of a matrix [rows, width] as float32 [n, width]."""
        ids = np.ascontiguousarray(ids, np.int32)
        width, rows = _matrix_shape(file, name)
        if len(ids) and (ids.min() < 0 or ids.max() >= rows):  # ggml would abort the process
            raise ValueError(f"{name} has rows 0..{rows - 1}, asked for {ids.min()}..{ids.max()}")
        return self._run(self._ggml.get_rows, file, name, ids[None], TYPE_I32, width, len(ids))

    def vector(self, file: GgufFile, name: str) -> F32:
        """A whole small tensor as float32: [n], or [rows, columns]."""
        _, rows = _matrix_shape(file, name)
        out = self.rows(file, name, np.arange(rows, dtype=np.int32))
        return out[0] if len(file[name].shape) == 1 else out

    def close(self) -> None:
        """Free the backend."""
        backend, self._backend = self._backend, 0
        if backend:
            self._ggml.backend_free(backend)

    def _run(
        self,
        operation: Operation,
        file: GgufFile,
        name: str,
        x: npt.NDArray[np.float32] | npt.NDArray[np.int32],
        kind: int,
        width: int,
        count: int | None = None,
    ) -> F32:
        out = np.empty((len(x) if count is None else count, width), np.float32)
        if out.size == 0:
            return out
        context = self._ggml.context(3)
        try:
            columns, rows = _matrix_shape(file, name)
            weight = self._ggml.new_tensor_2d(context, file[name].type, columns, rows)
            _point(weight, file.address(file[name]))
            given = self._ggml.new_tensor_2d(context, kind, x.shape[1], x.shape[0])
            _point(given, x.ctypes.data)
            result = operation(context, weight, given)
            _point(result, out.ctypes.data)
            self._compute(context, result, name)
        finally:
            self._ggml.free(context)
        return out

    def _compute(self, context: int, result: int, name: str) -> None:
        graph = self._ggml.new_graph(context)
        self._ggml.build_forward_expand(graph, result)
        if status := self._ggml.backend_graph_compute(self._backend, graph):
            raise RuntimeFailedError(f"ggml could not compute with {name}: status {status}")


def _matrix_shape(file: GgufFile, name: str) -> tuple[int, int]:
    """(columns, rows) of a tensor of one or two axes; more axes are counted as rows."""
    columns, *rest = file[name].shape
    return columns, int(np.prod(rest, dtype=np.int64))


def _point(tensor: int, address: int) -> None:
    ctypes.c_void_p.from_address(tensor + GgmlTensor.data.offset).value = address
