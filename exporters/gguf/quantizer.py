"""Rows of float32 to ggml's bytes: floats in numpy, everything else by ggml's own C function through ctypes.

`ggml_quantize_chunk` sits in libggml-base, which llama-cpp-python brings (preferred: a process that loads it later
must not meet a second library of the same soname) and libggml-python has prebuilt. Both write the same bytes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from functools import cache
from pathlib import Path

import numpy as np

from vlmedge.errors import RuntimeFailedError
from vlmedge.exporters.gguf.ggml import GgmlType
from vlmedge.session import F32, U8

PACKAGES = ("llama_cpp", "libggml")
_NAMES = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}


def library_path(packages: tuple[str, ...] | None = None) -> Path | None:
    """Where ggml's quantizer is, in the first of `packages` that has it, or None; no package is imported."""
    for package in PACKAGES if packages is None else packages:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            found = sorted(Path(folder).glob(f"*/{_NAMES.get(sys.platform, 'libggml-base.so')}"))
            if found:
                return found[0]
    return None


@cache
def load(path: Path | None) -> ctypes.CDLL:
    """Load the quantizer; raises RuntimeFailedError where there is none or it cannot be loaded."""
    if path is None:
        raise RuntimeFailedError(
            "quantizing needs ggml's quantizer, and neither llama-cpp-python nor libggml-python is installed with one: "
            "pip install libggml-python"
        )
    try:
        library = ctypes.CDLL(str(path))
        chunk = library.ggml_quantize_chunk
    except (OSError, AttributeError) as error:
        raise RuntimeFailedError(
            f"ggml's quantizer cannot be used ({error}): pip install --force-reinstall libggml-python"
        ) from None
    chunk.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    return library


def encode(rows: F32, kind: GgmlType) -> U8:
    """Encode float32 [n, columns] as `kind`: uint8 [bytes]. Several threads may call it; quantizing frees the GIL.

    Values beyond the range of F16 become infinite there; the caller checks.
    """
    if kind.name == "F32":
        return np.ascontiguousarray(rows).view(np.uint8).reshape(-1)
    if kind.name == "F16":
        with np.errstate(over="ignore"):
            return rows.astype(np.float16, order="C").view(np.uint8).reshape(-1)
    if kind.name == "BF16":
        return _bf16(rows)
    return _quantize(np.ascontiguousarray(rows), kind)


def _bf16(rows: F32) -> U8:
    """Round to nearest, ties to even, as hardware does."""
    bits = np.ascontiguousarray(rows).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    return rounded.astype(np.uint16).view(np.uint8).reshape(-1)


def _quantize(rows: F32, kind: GgmlType) -> U8:
    out = np.empty(kind.size(rows.shape), np.uint8)
    wrote = load(library_path()).ggml_quantize_chunk(
        kind.number, rows.ctypes.data, out.ctypes.data, 0, rows.shape[0], rows.shape[1], None
    )
    if wrote != out.nbytes:
        raise RuntimeFailedError(f"ggml's quantizer wrote {wrote} bytes of {kind.name} where {out.nbytes} were due")
    return out
