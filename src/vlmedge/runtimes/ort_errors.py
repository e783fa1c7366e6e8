"""ONNX Runtime's exceptions as ours: one line each, a damaged file told from a failed computation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from vlmedge.errors import BundleError, RuntimeFailedError


@cache
def native_errors() -> tuple[type[BaseException], ...]:
    """Every exception that ONNX Runtime raises: its own have no base but Exception, so the module is asked for all."""
    from onnxruntime.capi import onnxruntime_pybind11_state as native

    own = [kind for kind in vars(native).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*own, RuntimeError, ValueError, MemoryError)


@contextmanager
def loading(path: Path) -> Iterator[None]:
    """Raise BundleError for a graph that does not load, RuntimeFailedError where the machine is to blame."""
    try:
        yield
    except native_errors() as error:
        kind = type(error).__name__
        if kind in ("NotImplemented", "EPFail", "EngineError", "DeviceReset") or _out_of_memory(error):
            raise RuntimeFailedError(f"{path} cannot be run by this ONNX Runtime: {_line(error)}") from error
        raise BundleError(f"{path} does not load: {_line(error)}; export it again") from error


@contextmanager
def computing(what: str) -> Iterator[None]:
    """Raise RuntimeFailedError for a call of ONNX Runtime that fails."""
    try:
        yield
    except native_errors() as error:
        raise RuntimeFailedError(f"ONNX Runtime failed in {what}: {_line(error)}") from error


def _out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, MemoryError) or "bad_alloc" in text or "Failed to allocate memory" in text


def _line(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "out of memory"
    return " ".join(str(error).split()) or type(error).__name__
