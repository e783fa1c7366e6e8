"""One matrix product in bf16, for measuring how fast this processor can be."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vlmedge.reference.threads import torch_threads


def bf16_product(rows: int, inner: int, columns: int, threads: int) -> Callable[[], torch.Tensor]:
    """A call that multiplies random bf16 [rows, inner] by [inner, columns] with `threads` threads."""
    a, b = (torch.randn(shape).to(torch.bfloat16) for shape in ((rows, inner), (inner, columns)))

    def run() -> torch.Tensor:
        with torch_threads(threads), torch.inference_mode():
            return a @ b

    return run
