"""Files out of the page cache, so that opening a model is timed as after a start of the machine."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def drop(files: Iterable[Path]) -> bool:
    """Let the system forget what it has read of these files; False where it cannot be asked to.

    Pages that another process maps stay. https://man7.org/linux/man-pages/man2/posix_fadvise.2.html
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in files:
        try:
            with file.open("rb") as opened:
                os.fsync(opened.fileno())  # what is not written yet would stay
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:
            return False
    return True
