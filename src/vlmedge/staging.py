"""An output folder that is whole or absent: written under another name, flushed, and renamed at the end."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vlmedge.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def staged(out: Path, needed: int) -> Iterator[Path]:
    """A hidden sibling folder that becomes `out` when the block ends well, and vanishes when it does not.

    Parents that are missing are made, and vanish with it.
    Raises OutputError where `out` exists, its parent cannot be written, or the disk has less than `needed` bytes.
    """
    part, lock = out.parent / f".{out.name}.partial", None
    made = [parent for parent in out.parents if not os.path.lexists(parent)]
    try:
        if out.exists() or out.is_symlink():
            raise OutputError(f"{out} exists; remove it or choose another --out")
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = _claim(part, out)
        free = shutil.disk_usage(part).free
        if free < needed:
            raise OutputError(
                f"{out.parent} has {free / 1e6:,.1f} MB free, the export needs {needed / 1e6:,.1f} MB; "
                "free some space or choose another --out"
            )
        yield part
        for file in sorted(part.rglob("*")):
            _sync(file)
        part.rename(out)
        _sync(out.parent)
    except OSError as error:
        raise _output_error(out, error) from error
    finally:
        if lock is not None:
            shutil.rmtree(part, ignore_errors=True)
            lock.close()
        for parent in made:  # nearest first; a folder with something in it, like `out`, cannot be removed
            with suppress(OSError):
                parent.rmdir()


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; what it held before stays where writing fails.

    Raises OutputError where it cannot be written.
    """
    part = path.with_name(f".{path.name}.partial")
    try:
        part.write_text(text, encoding="utf-8")
        _sync(part)
        part.replace(path)
    except OSError as error:
        raise _output_error(path, error) from error
    finally:
        with suppress(OSError):  # where its folder is none, there is none of it either
            part.unlink(missing_ok=True)


def lock(handle: int) -> bool:
    """Lock an open file or folder for as long as this process has it open; False where another process has it locked.

    Windows, and some network disks, lock nothing.
    """
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


class _Lock:
    """Held by a live export, released by the system when its process dies. Windows has none, and needs none there."""

    def __init__(self, folder: Path) -> None:
        self._handle = None if fcntl is None else os.open(folder, os.O_RDONLY)

    def taken(self) -> bool:
        """Take the lock; False where another process has it."""
        return self._handle is None or lock(self._handle)

    def close(self) -> None:
        """Give it back."""
        if self._handle is not None:
            os.close(self._handle)


def _claim(part: Path, out: Path) -> _Lock:
    """Make the folder and lock it; what a killed export left there is removed."""
    part.mkdir(exist_ok=True)
    lock = _Lock(part)
    if not lock.taken():
        lock.close()
        raise OutputError(f"another export is writing {out}; wait for it or choose another --out")
    for left in part.iterdir():
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    return lock


def _output_error(out: Path, error: OSError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"the disk of {out.parent} is full; free some space or choose another --out")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(f"{out.parent} cannot be written: {os.strerror(error.errno)}; choose another --out")
    reason = error.strerror or str(error)
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        files = (parent for parent in out.parents if os.path.lexists(parent) and not os.path.isdir(parent))
        reason = next((f"{file} is not a folder" for file in files), reason)
    return OutputError(f"{out} cannot be written: {reason}; choose another --out")


def _sync(path: Path) -> None:
    """Flush a file or folder to disk, so that the rename never outlives the data."""
    folder = path.is_dir()
    if folder and os.name == "nt":
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)  # Windows flushes no file that is open for reading
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not folder:  # some network disks sync no folders
            raise
    finally:
        os.close(handle)
