"""One pass over the checkpoint: threads read rows, encode them and write them into their places in every file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import numpy as np

from vlmedge.errors import CheckpointError
from vlmedge.exporters.base import ExportJob
from vlmedge.exporters.gguf import quantizer
from vlmedge.exporters.gguf.container import GgufFile, Metadata
from vlmedge.exporters.gguf.layout import Stored
from vlmedge.session import F32
from vlmedge.tensors import Tensor

UNIT = 1 << 20  # elements that a thread reads, encodes and writes at a time: about 12 MB of buffers
F16_MAX = 65504.0


def write_files(job: ExportJob, stored: tuple[Stored, ...], metadata: Mapping[str, Metadata]) -> None:
    """Write every file of `metadata` into `job.out`: headers first, then each tensor in the order of the checkpoint.

    Raises CheckpointError for values that are not finite or beyond the range of F16, OSError where writing fails.
    """
    pieces: dict[str, list[Stored]] = {}
    for s in stored:
        pieces.setdefault(s.source, []).append(s)
    with ExitStack() as stack:
        files: dict[str, GgufFile] = {}
        for name, values in metadata.items():
            files[name] = GgufFile(job.out / name, values, [s for s in stored if s.file == name])
            stack.callback(files[name].close)
        # One thread more than cores, so that a read or write that waits leaves no core idle.
        pool = ThreadPoolExecutor(max(1, job.threads) + 1, thread_name_prefix="vlmedge-export")
        stack.callback(partial(pool.shutdown, cancel_futures=True))
        work: list[tuple[str, int, list[Future[None]]]] = []
        for name, tensor in job.tensors.items():
            one = partial(_unit, files, name, tensor, pieces[name])
            work.append((name, tensor.size, [pool.submit(one, start, stop) for start, stop in _units(tensor)]))
        for name, size, futures in work:
            for future in futures:
                future.result()
            job.progress(name, size)


def _units(tensor: Tensor) -> Iterator[tuple[int, int]]:
    step = max(1, UNIT // max(1, tensor.columns))
    return ((start, min(start + step, tensor.rows)) for start in range(0, tensor.rows, step))


def _unit(
    files: Mapping[str, GgufFile], name: str, tensor: Tensor, pieces: list[Stored], start: int, stop: int
) -> None:
    """Read rows once, and put them into every tensor that is made of them."""
    try:
        rows = tensor.read_rows(start, stop)
    except OSError as error:
        raise CheckpointError(f"cannot read {name}: {error.strerror}") from None
    if not np.isfinite(rows).all():
        raise CheckpointError(f"{name} has NaN or infinite values in rows {start} to {stop}; it cannot be exported")
    for stored in pieces:
        below = stored.rows - stop if stop == tensor.rows else 0
        part = _fit(_take(rows, stored), stored, below)
        if stored.kind.name == "F16" and np.abs(part).max(initial=0) > F16_MAX:
            raise CheckpointError(
                f"{name} has values beyond f16's {F16_MAX:.0f}; choose f32, or a profile whose rule for it has "
                'native = { gguf = "BF16" }'
            )
        files[stored.file].write(stored, start, quantizer.encode(part, stored.kind))


def _take(rows: F32, stored: Stored) -> F32:
    half = rows.shape[1] // 2
    if stored.take == "fold":
        return rows[:, :half] + rows[:, half:]
    return np.ascontiguousarray(rows[:, half:]) if stored.take == "local" else rows


def _fit(rows: F32, stored: Stored, below: int) -> F32:
    """Pad with zeros to the stored columns, and with `below` rows of them."""
    right = stored.columns - rows.shape[1]
    return np.pad(rows, ((0, below), (0, right))) if right or below else rows
