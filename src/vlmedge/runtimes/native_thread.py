"""One thread of its own for llama.cpp's computing.

On processors with AMX, ggml configures the tile registers once per thread and relies on them ever after. PyTorch
releases them when it is done, so a GGUF answer after a bf16 product of PyTorch in the same thread dies of an illegal
instruction. In a thread that PyTorch never sees, they stay as ggml left them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_pool: ThreadPoolExecutor | None = None
_lock = threading.Lock()
_here = threading.local()


def natively(function: Callable[P, T]) -> Callable[P, T]:
    """Run the function in that thread, one call after another, and wait for what it gives or raises.

    Called from the thread itself, or while the interpreter shuts down, it runs where it is.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if getattr(_here, "native", False):
            return function(*args, **kwargs)
        try:
            future = _thread().submit(function, *args, **kwargs)
        except RuntimeError:  # the interpreter is shutting down: its threads are done, nothing computes any more
            return function(*args, **kwargs)
        return future.result()

    return run


def _thread() -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(1, "vlmedge-native", initializer=_mark)
        return _pool


def _mark() -> None:
    _here.native = True


def _forget() -> None:
    """A forked child has the pool but not its thread."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
