"""Products of float32 are products of float32: PyTorch's shorter formats on GPUs are off while we compute.

PyTorch lets convolutions on CUDA use TF32 unless it is told otherwise (10 bits of mantissa instead of 23;
pytorch.org/docs/stable/notes/cuda.html), and programs around us may allow it for matrices too. These switches belong to
the whole process, so they are the caller's again after each call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch

from vlmedge.reference import threads


class Placed(threads.Threaded, Protocol):
    """Something that computes with `threads` threads on `device`."""

    device: torch.device


S = TypeVar("S", bound=Placed)
P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Let nothing on a CUDA device round float32 inside the block; elsewhere nothing is touched."""
    switches = _switches() if device.type == "cuda" else []
    before = [getattr(owner, name) for owner, name, _ in switches]
    for owner, name, exact in switches:
        setattr(owner, name, exact)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(switches, before, strict=True):
            setattr(owner, name, value)


def computing(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method that computes: without gradients, with its object's threads, in the precision that it names."""
    run = threads.computing(method)

    @wraps(method)
    def exactly(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with full_float32(self.device):
            return run(self, *args, **kwargs)

    return exactly


def _switches() -> list[tuple[Any, str, Any]]:
    """(owner, attribute, value that rounds nothing). PyTorch before 2.9 has only the older names."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):
        return [(matmul, "fp32_precision", "ieee"), (cudnn.conv, "fp32_precision", "ieee")]
    return [(matmul, "allow_tf32", False), (cudnn, "allow_tf32", False)]
