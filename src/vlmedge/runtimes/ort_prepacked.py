"""Graphs with their matrices in this processor's layout, written once and mapped ever after.

ONNX Runtime copies every matrix into the layout that computes fastest: anonymous memory, as large as the file. Saved
once, the copy is mapped like any file: the system can drop its pages, and processes share them. It suits one processor
and one version of ONNX Runtime only, so it is a cache and never part of a bundle.
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

from vlmedge.errors import BundleError, OutputError
from vlmedge.runtimes.ort_engine import Engine, InferenceSession

_CPUINFO = Path("/proc/cpuinfo")
_CPU_FACTS = ("model name", "flags", "CPU implementer", "CPU part", "Features")  # x86, then Arm
_PART = ".part-"
_ABANDONED = 3600  # seconds after which a folder that was never finished is nobody's


@dataclass(frozen=True, slots=True)
class PrepackedGraphs:
    """A folder that holds at most one prepacked copy of each graph that was ever opened through it."""

    folder: Path
    engine: Engine

    def open(self, path: Path, *, spinning: bool = False) -> InferenceSession:
        """Open the copy of a graph, which is written first where there is none.

        Raises BundleError for a damaged graph, OutputError where the folder cannot be written.
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
            self._sweep(path)
            part = Path(tempfile.mkdtemp(prefix=_PART, dir=self.folder))
            try:
                self.engine.open(path, saved_to=part / path.name)
                for file in part.iterdir():
                    _sync(file)
                if not copy.is_dir():  # another process may have been faster
                    part.rename(copy)
            finally:
                shutil.rmtree(part, ignore_errors=True)
        except OSError as error:
            raise OutputError(f"{self.folder} cannot keep the graphs that memory='lean' maps: {error}") from error

    def _sweep(self, path: Path) -> None:
        """Remove copies of the file as it was before, and what killed processes left unfinished."""
        for old in self.folder.glob(f"{_where(path)}-*"):
            shutil.rmtree(old, ignore_errors=True)
        for part in self.folder.glob(f"{_PART}*"):
            if time.time() - part.stat().st_mtime > _ABANDONED:
                shutil.rmtree(part, ignore_errors=True)


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
