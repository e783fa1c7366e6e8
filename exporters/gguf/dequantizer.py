"""ggml's bytes to rows of float32: floats in numpy, everything else by ggml's own C functions through ctypes."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np

from vlmedge.errors import BundleError, RuntimeFailedError
from vlmedge.exporters.base import Grain
from vlmedge.exporters.gguf import quantizer
from vlmedge.exporters.gguf.ggml import TYPES, GgmlType
from vlmedge.session import F32, U8

# Bits of a value, and the values of a row that share a scale (ggml/src/ggml-common.h). In K-quants and IQ4_XS these
# scales are integers that share one scale per 256 values: up to 15 (Q2_K), 31 (Q3_K, IQ4_XS), 63 (Q4_K, Q5_K) or
# 127 (Q6_K), and so are the minima of Q2_K, Q4_K and Q5_K. What is below half a step of these is lost as a whole. With
# L steps it is up to 2^bits / 4 L of the largest value step, and as much again where a minimum is rounded too. `share`
# brings the worst group of right encodings to half a step or less (tests/test_parity_weights.py measures them).
GRAINS = {
    "F32": Grain(32),
    "F16": Grain(16),
    "BF16": Grain(16, mantissa=7),
    "Q8_0": Grain(8, 32),
    "Q5_0": Grain(5, 32),
    "Q5_1": Grain(5, 32),
    "Q4_0": Grain(4, 32),
    "Q4_1": Grain(4, 32),
    "IQ4_NL": Grain(4, 32),
    "IQ4_XS": Grain(4, 32, whole=256, share=1 / 6),
    "Q6_K": Grain(6, 16, whole=256, share=1 / 6),
    "Q5_K": Grain(5, 32, whole=256, share=9 / 16),
    "Q4_K": Grain(4, 32, whole=256, share=1 / 4),
    "Q3_K": Grain(3, 16, whole=256, share=1 / 8),
    "Q2_K": Grain(2, 16, whole=256, share=1 / 5),
}
# Types that store a block's minimum, or steps of unequal length: among other values zero is only nearly zero.
NO_ZERO = frozenset({"Q5_1", "Q4_1", "IQ4_NL", "IQ4_XS", "Q5_K", "Q4_K", "Q2_K"})
_BY_NUMBER = {kind.number: kind for kind in TYPES.values()}


def type_of(number: int, where: str) -> GgmlType:
    """The type of that number in files; raises BundleError, about `where`, for one that is not read here."""
    if number not in _BY_NUMBER:
        raise BundleError(f"{where} has ggml's type {number}, which vlmedge does not write; export it again")
    return _BY_NUMBER[number]


def decode(data: U8, kind: GgmlType, columns: int) -> F32:
    """Bytes of whole rows of `columns` values -> float32 [rows, columns], a copy. Dequantizing frees the GIL.

    Raises RuntimeFailedError where a quantized type meets no ggml.
    """
    if kind.quantized:
        return _dequantize(np.ascontiguousarray(data), kind).reshape(-1, columns)
    if kind.name == "BF16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(-1, columns)
    stored = data.view(np.float16 if kind.name == "F16" else np.float32)
    return np.array(stored, dtype=np.float32, subok=False).reshape(-1, columns)


def _dequantize(data: U8, kind: GgmlType) -> F32:
    out = np.empty(data.nbytes // kind.bytes * kind.block, np.float32)
    _function(kind)(data.ctypes.data, out.ctypes.data, out.size)
    return out


@cache
def _function(kind: GgmlType) -> Any:
    name = f"dequantize_row_{kind.name.lower().replace('_k', '_K')}"  # ggml/src/ggml-quants.h
    library = quantizer.load(quantizer.library_path())
    if not hasattr(library, name):
        raise RuntimeFailedError(f"the installed ggml has no {name}: pip install --force-reinstall libggml-python")
    function = getattr(library, name)
    function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    return function
