"""Taps: copies of one tensor taken while a llama.cpp graph computes, through the scheduler's evaluation callback.

The scheduler asks for every node of the graph whether its data is wanted ("ask"), computes up to a wanted node,
and calls again with the data there. Returning false then ends the computation without an error.
"""

from __future__ import annotations

import ctypes
import re
from typing import Any

import numpy as np

from vlmedge.errors import RuntimeFailedError
from vlmedge.runtimes.ggml_library import TYPE_F32, GgmlTensor
from vlmedge.runtimes.llamacpp_native import Native
from vlmedge.session import F32

_NAME = GgmlTensor.name.offset
_SECOND_SOURCE = GgmlTensor.src.offset + ctypes.sizeof(ctypes.c_void_p)
_PATCHES = re.compile(rb"(?:[^#]*#)?patches(?:#\d+)?")


class Tap:
    """Takes float32 rows of one tensor of a graph. `wanted`: take the next one; `rows` is what was taken last."""

    def __init__(self, native: Native) -> None:
        self._ggml = native.ggml
        self.callback = native.llama.ggml_backend_sched_eval_callback(self._on_node)
        self.wanted = False
        self.rows: F32 | None = None

    def take(self, what: str) -> F32:
        """What was taken since `wanted` was set; raises RuntimeFailedError where the graph had no such tensor."""
        rows, self.rows, self.wanted = self.rows, None, False
        if rows is None:
            raise RuntimeFailedError(
                f"llama.cpp's graph has no float32 tensor for the {what}; the versions known to work: 0.3.36"
            )
        return rows

    def _on_node(self, tensor: int, ask: bool, _user: Any) -> bool:
        raise NotImplementedError

    def _read(self, tensor: int, *, last_only: bool) -> None:
        found = GgmlTensor.from_address(tensor)
        width, count = found.ne[0], found.ne[1]
        if found.type != TYPE_F32 or found.nb[1] != 4 * width:
            return
        first = count - 1 if last_only else 0
        rows = np.empty((count - first, width), np.float32)
        self._ggml.backend_tensor_get(tensor, rows.ctypes.data, first * 4 * width, rows.nbytes)
        self.rows = rows


class LastHiddenTap(Tap):
    """The last row of the last layer's output, before the final norm: the tensor named `l_out-<last>`.

    `llama_get_embeddings` would give it after the norm.
    """

    def __init__(self, native: Native, layers: int) -> None:
        super().__init__(native)
        self._target = f"l_out-{layers - 1}\0".encode()
        self._length = len(self._target)

    def _on_node(self, tensor: int, ask: bool, _user: Any) -> bool:
        if not self.wanted:
            return False
        if ask:  # once per node of the graph: hundreds of times per token, so it is all there is in one line
            return ctypes.string_at(tensor + _NAME, self._length) == self._target
        self._read(tensor, last_only=True)
        return True


class TowerTap(Tap):
    """All rows of a vision tower, before its projector: the rows gathered by the input named `patches`.

    It ends the graph there: the projector of stock llama.cpp is not computed. On a GPU the scheduler makes a copy of
    each input, which it names after the device: "CUDA0#patches#0" (ggml-backend.cpp, ggml_backend_sched_split_graph).
    """

    def _on_node(self, tensor: int, ask: bool, _user: Any) -> bool:
        if ask:
            source = ctypes.c_void_p.from_address(tensor + _SECOND_SOURCE).value
            return source is not None and bool(_PATCHES.fullmatch(ctypes.string_at(source + _NAME)))
        self._read(tensor, last_only=False)
        return False
