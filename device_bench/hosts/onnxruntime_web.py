"""Where onnxruntime-web lies: the folder that the user names, or the one that npm makes once in vlmedge's cache."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Final

from vlmedge.device_bench.hosts.served import check_modules
from vlmedge.device_bench.outcome import last_line
from vlmedge.errors import RuntimeFailedError
from vlmedge.runtimes.cache import cache_folder

VERSION: Final = "1.30.0"
_SECONDS = 300.0


def onnxruntime_web(named: str = "", cache: Path | None = None) -> Path:
    """The `dist` folder of the npm package; `cache` replaces vlmedge's own cache folder.

    Raises RuntimeFailedError where the named folder is none, or where npm is missing or fails.
    """
    if named:
        return check_modules(Path(named))
    home = cache or cache_folder()
    if home is None:
        raise RuntimeFailedError("onnxruntime-web has no place (there is no home folder); name it: onnxruntime_web")
    folder = home / f"onnxruntime-web-{VERSION}"
    dist = folder / "node_modules/onnxruntime-web/dist"
    if not (folder / "node_modules/.package-lock.json").is_file():  # npm writes it last
        _install(folder)
    return check_modules(dist)


def _install(folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeFailedError(
            "a browser needs onnxruntime-web, and npm, which would fetch it, is not installed; install Node.js, or put "
            "the package's 'dist' folder here and name it in the device's options: onnxruntime_web"
        )
    flags = ["--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund", "--no-save"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        words = [npm, "install", *flags, "--prefix", str(folder), f"onnxruntime-web@{VERSION}"]
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeFailedError(f"npm did not install onnxruntime-web within {_SECONDS:.0f} s; run again") from None
    except OSError as error:
        raise RuntimeFailedError(f"onnxruntime-web cannot be put into {folder}: {error.strerror}") from None
    if done.returncode:
        raise RuntimeFailedError(
            f"npm could not install onnxruntime-web: {last_line(done.stderr) or 'no reason given'}"
        )
