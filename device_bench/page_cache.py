"""A model's files out of the page cache, or in it, so that it is known what opening the model has to read."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

_OUT, _IN = 0.1, 0.9  # shares of the pages: with fewer files are out, with more they are in
_PART = 1 << 28  # bytes that are looked at in one go
_BLOCK = 1 << 22


def drop(files: Iterable[Path]) -> bool:
    """Let the system forget what it has read of these files; False where it does not, or cannot be asked to.

    Pages that another process maps stay, and all of a disk in memory (tmpfs).
    https://man7.org/linux/man-pages/man2/posix_fadvise.2.html
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    files = list(files)
    try:
        for file in files:
            with file.open("rb") as opened:
                os.fsync(opened.fileno())  # what is not written yet would stay
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        share = cached(files)
    except OSError:
        return False
    return share is None or share <= _OUT


def fill(files: Iterable[Path]) -> bool:
    """Read these files once; False where the system did not keep them: it gives pages up when it needs the memory."""
    files = list(files)
    try:
        for file in files:
            with file.open("rb", buffering=0) as opened:
                block = bytearray(_BLOCK)
                while opened.readinto(block):
                    pass
        share = cached(files)
    except OSError:
        return False
    return share is None or share >= _IN


def cached(files: Sequence[Path]) -> float | None:
    """The share of the files' pages that is in the page cache, 1 of empty files; None where the system does not tell.

    Linux tells it of files that one owns or may write: https://man7.org/linux/man-pages/man2/mincore.2.html
    """
    if not hasattr(os, "posix_fadvise") or not all(os.access(file, os.W_OK) for file in files):
        return None
    found = [here for file in files for here in _parts(file)]
    return float(np.concatenate(found).mean()) if found else 1.0


def _parts(file: Path) -> Iterator[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    """Of each page of each part of a file: 1 where it is in the cache. Raises OSError where that cannot be asked."""
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    with file.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        for start in range(0, size, _PART):
            length = min(_PART, size - start)
            found = np.zeros(-(-length // mmap.PAGESIZE), np.uint8)
            with mmap.mmap(opened.fileno(), length, access=mmap.ACCESS_READ, offset=start) as mapped:
                view = np.frombuffer(mapped, np.uint8)
                addresses = ctypes.c_void_p(view.ctypes.data), ctypes.c_void_p(found.ctypes.data)
                del view  # nothing may point into what is unmapped
                if mincore(addresses[0], ctypes.c_size_t(length), addresses[1]):
                    raise OSError(ctypes.get_errno(), f"mincore: {os.strerror(ctypes.get_errno())}")
            yield found & np.uint8(1)
