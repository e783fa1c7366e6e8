"""PyTorch's thread count belongs to the whole process: it is ours while we compute, and the caller's again after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch


class Threaded(Protocol):
    """Something that computes with `threads` threads; None or 0 for as many as PyTorch has."""

    threads: int | None


S = TypeVar("S", bound=Threaded)
P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let PyTorch use `count` threads for the length of the block; None or 0 leaves its count as it is."""
    before = torch.get_num_threads()
    if not count or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def computing(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method that computes: without gradients, with its object's threads."""

    @wraps(method)
    def run(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch_threads(self.threads), torch.inference_mode():
            return method(self, *args, **kwargs)

    return run
