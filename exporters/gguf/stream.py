"""Rows of every tensor to their places in every GGUF file, encoded as they pass."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import numpy as np

from vlmedge.errors import CheckpointError
from vlmedge.exporters.base import ExportJob
from vlmedge.exporters.gguf import quantizer
from vlmedge.exporters.gguf.container import GgufFile, Metadata
from vlmedge.exporters.gguf.layout import Stored
from vlmedge.exporters.passing import F16_MAX, pass_over
from vlmedge.session import F32
from vlmedge.tensors import Tensor


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

        def take(name: str, tensor: Tensor, start: int, rows: F32) -> None:
            for stored in pieces[name]:
                _put(files[stored.file], stored, name, tensor, start, rows)

        pass_over(job, take)


def _put(file: GgufFile, stored: Stored, name: str, tensor: Tensor, start: int, rows: F32) -> None:
    stop = start + len(rows)
    below = stored.rows - stop if stop == tensor.rows else 0
    part = _fit(_take(rows, stored), stored, below)
    if stored.kind.name == "F16" and np.abs(part).max(initial=0) > F16_MAX:
        raise CheckpointError(
            f"{name} has values beyond f16's {F16_MAX:.0f}; choose f32, or a profile whose rule for it has "
            'native = { gguf = "BF16" }'
        )
    file.write(stored, start, quantizer.encode(part, stored.kind))


def _take(rows: F32, stored: Stored) -> F32:
    half = rows.shape[1] // 2
    if stored.take == "fold":
        return rows[:, :half] + rows[:, half:]
    return np.ascontiguousarray(rows[:, half:]) if stored.take == "local" else rows


def _fit(rows: F32, stored: Stored, below: int) -> F32:
    """Pad with zeros to the stored columns, and with `below` rows of them."""
    right = stored.columns - rows.shape[1]
    return np.pad(rows, ((0, below), (0, right))) if right or below else rows
