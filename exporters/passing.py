"""One pass over a checkpoint: threads read rows of every tensor once, check them, and hand them to the format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import TypeAlias

import numpy as np

from vlmedge.errors import CheckpointError
from vlmedge.exporters.base import ExportJob
from vlmedge.session import F32
from vlmedge.tensors import Tensor

UNIT = 1 << 20  # elements that a thread reads, encodes and writes at a time: about 12 MB of buffers
F16_MAX = 65504.0
Take: TypeAlias = Callable[[str, Tensor, int, F32], None]


def pass_over(job: ExportJob, take: Take) -> None:
    """Call `take(name, tensor, start, rows)` for all rows float32 [n, columns] of every tensor, from several threads.

    Tensors come in the order of the checkpoint, and are reported to the job's progress as they are done. Raises
    CheckpointError for rows that cannot be read or are not finite, and whatever `take` raises.
    """
    with ExitStack() as stack:
        # One thread more than cores, so that a read or write that waits leaves no core idle.
        pool = ThreadPoolExecutor(max(1, job.threads) + 1, thread_name_prefix="vlmedge-export")
        stack.callback(partial(pool.shutdown, cancel_futures=True))
        work: list[tuple[str, int, list[Future[None]]]] = []
        for name, tensor in job.tensors.items():
            units = [pool.submit(_unit, name, tensor, start, stop, take) for start, stop in _units(tensor)]
            work.append((name, tensor.size, units))
        for name, size, futures in work:
            for future in futures:
                future.result()
            job.progress(name, size)


def _units(tensor: Tensor) -> Iterator[tuple[int, int]]:
    step = max(1, UNIT // max(1, tensor.columns))
    return ((start, min(start + step, tensor.rows)) for start in range(0, tensor.rows, step))


def _unit(name: str, tensor: Tensor, start: int, stop: int, take: Take) -> None:
    try:
        rows = tensor.read_rows(start, stop)
    except OSError as error:
        raise CheckpointError(f"cannot read {name}: {error.strerror}") from None
    if not np.isfinite(rows).all():
        raise CheckpointError(f"{name} has NaN or infinite values in rows {start} to {stop}; it cannot be exported")
    take(name, tensor, start, rows)
