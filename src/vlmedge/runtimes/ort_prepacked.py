"""Graphs with their matrices in this processor's layout, written once and mapped ever after.

ONNX Runtime copies every matrix into the layout that computes fastest: anonymous memory, as large as the file. Saved
once, the copy is mapped like any file: the system can drop its pages, and processes share them. It suits one processor
and one version of ONNX Runtime only, so it is a cache and never part of a bundle. And it is tried before it is kept:
ONNX Runtime 1.30 and 1.31 save MatMulNBits so that it computes nonsense (seen on x86 with AMX; 1.32 is right).
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlmedge.errors import BundleError, OutputError, RuntimeFailedError
from vlmedge.runtimes.ort_engine import Engine, InferenceSession
from vlmedge.runtimes.ort_errors import computing
from vlmedge.runtimes.ort_kv import PAST, TYPES

_CPUINFO = Path("/proc/cpuinfo")
_CPU_FACTS = ("model name", "flags", "CPU implementer", "CPU part", "Features")  # x86, then Arm
_PART = ".part-"
_ROWS, _NEAR = 3, 0.05  # nonsense is off by 0.5 and more
_ABANDONED = 3600  # seconds after which a folder that was never finished is nobody's


@dataclass(frozen=True, slots=True)
class PrepackedGraphs:
    """A folder that holds at most one prepacked copy of each graph that was ever opened through it."""

    folder: Path
    engine: Engine

    def open(self, path: Path, *, spinning: bool = False) -> InferenceSession:
        """Open the copy of a graph, which is written first where there is none.

        Raises BundleError for a damaged graph, OutputError where the folder cannot be written, RuntimeFailedError where
        the copy computes something else.
        """
        if not path.is_file():
            raise BundleError(f"{path} is missing; export it again")
        copy = self._copy_of(path)
        if copy.is_dir():
            try:
                return self.engine.open(copy / path.name, spinning=spinning)
            except BundleError:
                shutil.rmtree(copy, ignore_errors=True)  # damaged since: the bundle's own graph is at hand
        self._write(path, copy)
        return self.engine.open(copy / path.name, spinning=spinning)

    def _copy_of(self, path: Path) -> Path:
        return self.folder / f"{_where(path)}-{_what(path, self.engine)}"

    def _write(self, path: Path, copy: Path) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep(path, copy)
            part = Path(tempfile.mkdtemp(prefix=_PART, dir=self.folder))
            try:
                self._check(self._save(path, part / path.name), part / path.name)
                for file in part.iterdir():
                    _sync(file)
                _put_in_place(part, copy)
            finally:
                shutil.rmtree(part, ignore_errors=True)
        except OSError as error:
            raise OutputError(
                f"{self.folder} cannot keep the graphs that memory='lean' maps: {error.strerror or error}; "
                "leave memory='fast', or choose another folder for caches (on Linux by XDG_CACHE_HOME)"
            ) from error

    def _save(self, path: Path, target: Path) -> InferenceSession:
        """Open a graph once, to save it. ONNX Runtime has one error for a damaged graph and for a full disk."""
        try:
            return self.engine.open(path, saved_to=target)
        except BundleError as error:
            self.engine.open(path, prepack=False)  # raises where it is the bundle's
            raise OSError(f"saving {path.name} failed; the disk needs twice the bytes of its weights") from error

    def _check(self, original: InferenceSession, copy: Path) -> None:
        """Compare what a graph and its copy make of one small input."""
        import onnxruntime

        feeds = _feeds(original)
        with computing(f"trying a copy of {copy.name}"):
            wanted, got = (session.run(None, feeds) for session in (original, self.engine.open(copy)))
        if not all(_near(ours, theirs) for ours, theirs in zip(got, wanted, strict=True)):
            raise RuntimeFailedError(
                f"onnxruntime {onnxruntime.__version__} saves {copy.name} so that it computes something else, which "
                "memory='lean' needs; pip install --upgrade onnxruntime, or leave memory='fast'"
            )

    def _sweep(self, path: Path, copy: Path) -> None:
        """Remove copies of the file as it was before, and what killed processes left unfinished."""
        for old in self.folder.glob(f"{_where(path)}-*"):
            if old != copy:  # which another process has just finished
                shutil.rmtree(old, ignore_errors=True)
        for part in self.folder.glob(f"{_PART}*"):
            if _age(part) > _ABANDONED:
                shutil.rmtree(part, ignore_errors=True)


def _feeds(session: InferenceSession) -> dict[str, npt.NDArray[Any]]:
    """A few rows of noise, everything alive, no past."""
    rng = np.random.default_rng(0)
    out: dict[str, npt.NDArray[Any]] = {}
    for node in session.get_inputs():
        rows = 0 if node.name.startswith(PAST) else _ROWS
        shape = [dim if isinstance(dim, int) else rows for dim in node.shape]
        noise = rng.standard_normal(shape, np.float32) if node.type == "tensor(float)" else np.ones(shape)
        out[node.name] = noise.astype(TYPES.get(node.type, np.int64))
    return out


def _near(ours: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> bool:
    """Equal but for the order of sums; int8 keys and values may round to the next step."""
    difference = np.linalg.norm(ours.astype(np.float64) - theirs)
    return bool(difference <= _NEAR * np.linalg.norm(theirs.astype(np.float64)))  # False for NaN


def _put_in_place(part: Path, copy: Path) -> None:
    """Rename a finished folder; one of that name is as good, if another process was faster."""
    try:
        part.rename(copy)
    except OSError:
        if not copy.is_dir():
            raise


def _age(folder: Path) -> float:
    """Seconds since it was made; 0 for one that another process has just removed."""
    try:
        return time.time() - folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _where(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:12]


def _what(path: Path, engine: Engine) -> str:
    """Hash everything that the copy depends on: the graph, its data files' sizes and times, the software, the CPU."""
    import onnxruntime

    digest = hashlib.sha256(path.read_bytes())
    for data in sorted(path.parent.glob("*.onnx_data*")):  # graphs may share a file
        stat = data.stat()
        digest.update(f"{data.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    digest.update(f"{onnxruntime.__version__} {engine.provider} {platform.machine()}\n{_cpu()}".encode())
    return digest.hexdigest()[:20]


def _cpu() -> str:
    try:
        first = _CPUINFO.read_text().split("\n\n", 1)[0]
    except OSError:
        return platform.processor()
    return "\n".join(line for line in first.splitlines() if line.startswith(_CPU_FACTS))


def _sync(path: Path) -> None:
    """Flush a file, so that the rename never outlives the data."""
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())
