"""A process that starts another and ends with it, or ends it when nobody listens any more: the standard library alone.

    python -I guard.py SECONDS PROGRAM [ARGUMENT ...]

The first line of stdin is the program's whole stdin. When stdin ends after that, the asking process or the connection
to it is gone, and the program with everything that it started is killed; after SECONDS too. The exit code is the
program's, as shells give it: 128 + the signal that ended it, 127 where it cannot be started; 255, which is ssh's own
word for a lost connection, becomes 254. On machines behind ssh this text runs as `python3 -I -c`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(seconds: float, command: list[str]) -> NoReturn:
    """Run the command under guard."""
    if os.name != "nt" and os.getpid() != os.getpgid(0):
        os.setpgid(0, 0)  # a group of its own, that can be killed whole
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, preexec_fn=_bound())
    except OSError as error:
        print(f"{command[0]} cannot be started: {error.strerror}", file=sys.stderr, flush=True)  # noqa: T201
        os._exit(127)
    for work in (lambda: _feed(process), lambda: _limit(seconds, process)):
        threading.Thread(target=work, daemon=True).start()
    code = process.wait()
    os._exit(_plain(code))  # not sys.exit: a thread is reading stdin


def _bound() -> Callable[[], object] | None:
    """Linux: what makes a child end when this process is killed, as Ray does with the children of its workers."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return lambda: library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # there is one thread so far: it may call Python


def _feed(process: subprocess.Popen[bytes]) -> None:
    """Hand on the first line, then wait for the end of stdin."""
    source, sink = sys.stdin.buffer, process.stdin
    assert sink is not None
    try:
        sink.write(source.readline())
        sink.close()
    except OSError:
        pass  # it has ended, or does not want to know
    while source.read(1 << 16):
        pass
    _kill(process)


def _limit(seconds: float, process: subprocess.Popen[bytes]) -> None:
    time.sleep(seconds)
    _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> NoReturn:
    """End the group: the program, what it started, and this process."""
    if os.name != "nt":
        os.killpg(0, signal.SIGKILL)
    subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True, check=False)
    os._exit(1)


def _plain(code: int) -> int:
    if code < 0:
        return 128 - code
    if os.name == "nt":
        return code - (1 << 32) if code >= 1 << 31 else code  # the same 32 bits, in the range that exit takes
    return min(code, 254)


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
