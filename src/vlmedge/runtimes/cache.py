"""Where files lie that can be made again."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def cache_folder() -> Path | None:
    """Where files may lie that can be made again, in the system's own place; None where there is no home folder."""
    system = platform.system()
    named = os.environ.get({"Darwin": "", "Windows": "LOCALAPPDATA"}.get(system, "XDG_CACHE_HOME"), "")
    if os.path.isabs(named):  # the XDG specification: a relative path is to be ignored
        return Path(named) / "vlmedge"
    try:
        home = Path.home()
    except RuntimeError:
        return None
    rest = {"Darwin": "Library/Caches", "Windows": "AppData/Local"}.get(system, ".cache")
    return home / rest / "vlmedge"
