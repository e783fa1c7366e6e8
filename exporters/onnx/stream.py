"""Rows of every tensor to their places in the data files, encoded as they pass."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vlmedge.errors import CheckpointError
from vlmedge.exporters.base import ExportJob
from vlmedge.exporters.onnx.files import FOLDER, Built
from vlmedge.exporters.onnx.kv_scales import observers, scales_of
from vlmedge.exporters.onnx.packing import block_rows, nibbles, signed
from vlmedge.exporters.onnx.store import Section, Weight
from vlmedge.exporters.passing import F16_MAX, pass_over
from vlmedge.quant_profiles.grids import Codes, encode
from vlmedge.session import F32, U8
from vlmedge.tensors import Tensor

_POSITIONAL = hasattr(os, "pwrite")  # Windows has none
_MODE = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)


class DataFiles:
    """The data files of an export, each as long as it will be."""

    def __init__(self, folder: Path, sizes: Mapping[str, int]) -> None:
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()
        try:
            for name, size in sizes.items():
                self._files[name] = os.open(folder / name, _MODE, 0o644)
                os.ftruncate(self._files[name], size)
        except OSError:
            self.close()
            raise

    def write(self, section: Section, start: int, data: npt.NDArray[np.generic]) -> None:
        """Write an array at `start` bytes into a section."""
        view = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        at = section.offset + start
        while view:
            wrote = self._some(self._files[section.file], view, at)
            view, at = view[wrote:], at + wrote

    def _some(self, file: int, view: memoryview, at: int) -> int:
        if _POSITIONAL:
            return os.pwrite(file, view, at)
        with self._lock:
            os.lseek(file, at, os.SEEK_SET)
            return os.write(file, view)

    def close(self) -> None:
        """Close them all."""
        for file in self._files.values():
            os.close(file)


class RowSink:
    """Takes rows of a matrix that is stored row after row, or of a vector."""

    def __init__(self, weight: Weight, files: DataFiles) -> None:
        self._weight, self._files = weight, files

    def put(self, at: int, rows: F32) -> None:
        """Encode and write rows, the first being number `at` of the stacked matrix."""
        weight, sections = self._weight, self._weight.sections
        if weight.kind.floating:
            section = sections["values"]
            data = rows if weight.kind.bits == 32 else _halves(rows)
            self._files.write(section, at * section.bytes // weight.rows, data)
            return
        for role, array in block_rows(encode(rows, weight.kind.grid), weight.kind).items():
            section = sections[role]
            self._files.write(section, at * section.bytes // weight.rows, array)


class ColumnSink:
    """Takes rows of a matrix that is stored transposed: kept in memory until the last has come."""

    def __init__(self, weight: Weight, files: DataFiles) -> None:
        self._weight, self._files = weight, files
        self._arrays: dict[str, npt.NDArray[np.generic]] = {}
        self._missing = weight.rows
        self._lock = threading.Lock()

    def put(self, at: int, rows: F32) -> None:
        """Encode rows, the first being number `at`; write the whole matrix with the last ones."""
        codes = encode(rows, self._weight.kind.grid)
        with self._lock:
            if not self._arrays:
                self._arrays = self._room(codes)
        part = slice(at, at + len(rows))
        self._arrays["codes"][:, part] = signed(codes.codes, self._weight.kind).T
        self._arrays["scales"][:, part] = codes.scales.T
        if codes.zeros is not None:
            self._arrays["zeros"][:, part] = codes.zeros.T
        with self._lock:
            self._missing -= len(rows)
            done = not self._missing
        if done:
            self._flush()

    def _room(self, codes: Codes) -> dict[str, npt.NDArray[np.generic]]:
        n, (_, k), groups = self._weight.rows, codes.codes.shape, codes.scales.shape[1]
        out: dict[str, npt.NDArray[np.generic]] = {
            "codes": np.empty((k, n), np.uint8),
            "scales": np.empty((groups, n), codes.scales.dtype),
        }
        return out if codes.zeros is None else out | {"zeros": np.empty((groups, n), np.uint8)}

    def _flush(self) -> None:
        for role in list(self._arrays):
            array = self._arrays.pop(role)
            if array.dtype == np.uint8 and self._weight.kind.bits == 4:
                array = _packed(array)
            self._files.write(self._weight.sections[role], 0, array)


Put = Callable[[int, F32], None]


def write_data(job: ExportJob, built: Built) -> None:
    """Write every data file into the job's `onnx` folder, each tensor read once, in the order of the checkpoint.

    Raises CheckpointError for values that are not finite or beyond the range of F16, OSError where writing fails.
    """
    scales = tuple(built.store.kv_scales.values())
    watching = observers(job.order.spec.decoder, job.tensors, scales)
    with closing(DataFiles(job.out / FOLDER, built.sizes)) as files:
        readers = _readers(built, files)

        def take(name: str, _: Tensor, start: int, rows: F32) -> None:
            if name in watching:
                watching[name].see(start, rows)
            for put, base in readers.get(name, []):
                _put(put, name, base + start, rows)

        pass_over(job, take)
        for scale in scales:
            seen = watching[f"decoder.layers.{scale.layer}.attn.{scale.part}.weight"]
            files.write(scale.section, 0, scales_of(job.order.spec.decoder, scale.part, seen))


def _readers(built: Built, files: DataFiles) -> dict[str, list[tuple[Put, int]]]:
    """Canonical tensor -> who takes its rows, and the number of its first row there."""
    out: dict[str, list[tuple[Put, int]]] = {}
    for weight in built.store.weights.values():
        sink = (ColumnSink if weight.form == "columns" else RowSink)(weight, files)
        for source, start, _ in weight.pieces():
            out.setdefault(source, []).append((sink.put, start))
    return out


def _put(put: Put, name: str, at: int, rows: F32) -> None:
    try:
        put(at, rows)
    except CheckpointError as error:  # of values that the kind cannot hold
        raise CheckpointError(f"{name}: {error}") from None


def _halves(rows: F32) -> npt.NDArray[np.float16]:
    if np.abs(rows).max(initial=0) > F16_MAX:
        raise CheckpointError(f"values beyond f16's {F16_MAX:.0f}; choose f32 for it")
    return rows.astype(np.float16)


def _packed(codes: U8 | npt.NDArray[np.generic]) -> U8:
    flat = codes.astype(np.uint8, copy=False).reshape(-1) & np.uint8(0xF)
    return nibbles(np.pad(flat, (0, flat.size % 2)))
