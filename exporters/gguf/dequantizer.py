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

# Bits of a value, and the values of a row that share what is rounded with them (ggml/src/ggml-common.h): the scales
# of K-quants and of IQ4_XS are integers of 4, 6 or 8 bits that themselves share one scale per 256.
GRAINS = {
    "F32": Grain(32),
    "F16": Grain(16),
    "BF16": Grain(16),
    "Q8_0": Grain(8, 32),
    "Q5_0": Grain(5, 32),
    "Q5_1": Grain(5, 32),
    "Q4_0": Grain(4, 32),
    "Q4_1": Grain(4, 32),
    "IQ4_NL": Grain(4, 32),
    "IQ4_XS": Grain(4, 256),
    "Q6_K": Grain(6, 256),
    "Q5_K": Grain(5, 256),
    "Q4_K": Grain(4, 256),
    "Q3_K": Grain(3, 256),
    "Q2_K": Grain(2, 256),
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
