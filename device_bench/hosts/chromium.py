"""A browser of the Chromium family, started for one task with an empty profile and without a window, and its end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final

from vlmedge.device_bench.hosts import guard
from vlmedge.device_bench.outcome import last_line
from vlmedge.errors import RuntimeFailedError

NAMES: Final = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "microsoft-edge",
    "microsoft-edge-stable",
    "chrome",
    "msedge",
)
_PLACES: Final = {
    "darwin": (
        "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
        "/Applications/Chromium.app/Contents/MacOS/Chromium",
        "/Applications/Microsoft Edge.app/Contents/MacOS/Microsoft Edge",
    ),
    "win32": (
        r"C:\Program Files\Google\Chrome\Application\chrome.exe",
        r"C:\Program Files (x86)\Microsoft\Edge\Application\msedge.exe",
        r"C:\Program Files\Microsoft\Edge\Application\msedge.exe",
    ),
}
# https://peter.sh/experiments/chromium-command-line-switches/
_FLAGS: Final = (
    "--headless=new",
    "--no-first-run",
    "--no-default-browser-check",
    "--no-proxy-server",  # the page comes from this machine, and asks nobody else
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--disable-dev-shm-usage",  # containers have 64 MB there
    "--disable-background-timer-throttling",
    "--disable-renderer-backgrounding",
    "--enable-unsafe-webgpu",  # Linux: WebGPU is off on most GPUs otherwise
    "--enable-logging=stderr",
)


def find_browser(named: str = "") -> str:
    """The program: the one that the user names (a path or a name on PATH), or the first of the family that is here.

    Raises RuntimeFailedError with what to do.
    """
    if named:
        program = shutil.which(named)
        if program is None:
            raise RuntimeFailedError(f"there is no program {named}; correct the device's option program")
        return program
    here = [place for place in _PLACES.get(sys.platform, ()) if Path(place).is_file()]
    program = next(filter(None, map(shutil.which, NAMES)), None) or next(iter(here), None)
    if program is None:
        raise RuntimeFailedError(
            "no Chromium, Chrome or Edge is on PATH; install one (apt-get install chromium), name it in the device's "
            "option program, or open the page in another browser (option url = 'wait')"
        )
    return program


def version(program: str) -> str:
    """What the program calls itself, "" where it does not tell."""
    if sys.platform == "win32":
        return ""  # there it opens a window instead
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=30, check=False)
        return last_line(done.stdout)
    return ""


class Browser:
    """A running browser, to be used in a `with` block; it ends with the block and with this process.

    `seconds`: after which it is ended in any case. Raises RuntimeFailedError where it cannot be started.
    """

    def __init__(self, program: str, address: str, seconds: float, flags: Sequence[str] = ()) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="vlmedge-browser-", ignore_cleanup_errors=True)
        self._log = Path(self._profile.name) / "stderr"
        root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []  # it refuses to start else
        profile = f"--user-data-dir={self._profile.name}/profile"
        command = [program, *_FLAGS, *root, *flags, profile, address]
        guarded = [sys.executable, "-I", str(Path(guard.__file__)), str(seconds), *command]
        try:
            self._process = _started(guarded, self._log)
        except OSError as error:
            self._profile.cleanup()
            raise RuntimeFailedError(f"no process can be started here: {error.strerror}") from None

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        self._profile.cleanup()

    @property
    def pid(self) -> int:
        """The number of the process whose children are the browser's."""
        return self._process.pid

    @property
    def code(self) -> int | None:
        """How it ended (`guard`'s code), None while it runs."""
        return self._process.poll()

    def said(self) -> str:
        """The end of its stderr."""
        with suppress(OSError), self._log.open("rb") as file:
            file.seek(max(0, self._log.stat().st_size - (64 << 10)))
            return file.read().decode("utf-8", "replace")
        return ""

    def last_words(self) -> str:
        """The last line of it."""
        return last_line(self.said()) or "it said nothing"

    def _end(self) -> None:
        """Asked to close, it takes seconds; its profile is thrown away."""
        if os.name == "nt":
            kill = ["taskkill", "/T", "/F", "/PID", str(self._process.pid)]
            subprocess.run(kill, capture_output=True, check=False)
        else:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()


def _started(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    flags = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)  # Windows: Ctrl-C is ours alone
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # held open: the guard ends the browser when it closes
            stdout=stderr,
            stderr=stderr,
            start_new_session=os.name != "nt",
            creationflags=flags,
        )
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.flush()
    return process
