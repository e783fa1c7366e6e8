"""A process and its end: its time, its input, the end of its output, and nothing left behind."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from threading import Thread
from typing import IO, BinaryIO, Final

from vlmedge.device_bench.hosts import guard
from vlmedge.device_bench.hosts.host import Output
from vlmedge.errors import RuntimeFailedError

STDOUT: Final = 32 << 20  # bytes that are kept of each stream, from its end; a long sustain job's reply has some MB
STDERR: Final = 1 << 20
_LOOK = 0.5  # seconds between two looks at a process: Windows hears no Ctrl-C while it waits for one
_GRACE = 5.0  # seconds after which the guard ends what this process should have ended
_LAST_WORDS = 2.0  # seconds for reading what a process that has ended left in its pipes


def run_process(
    command: Sequence[str],
    stdin: str | BinaryIO,
    timeout: float | None,
    *,
    hold: bool = False,
    env: Mapping[str, str] | None = None,
) -> Output:
    """Run a command in a session of its own until it ends or `timeout` seconds are over; then nothing of it is left.

    `stdin`: text, or an open file whose rest it gets. `hold`: its stdin stays open for as long as this process lives
    and listens, which is what `guard` watches. Only the last 32 MiB of its stdout and the last 1 MiB of its stderr are
    kept. Whatever interrupts this call (Ctrl-C) ends the process too. Raises OSError where it cannot be started.
    """
    process = _start(command, env)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    source = BytesIO(stdin.encode()) if isinstance(stdin, str) else stdin
    feeder = Thread(target=_feed, args=(source, process.stdin, hold), daemon=True)
    tails = (_Tail(process.stdout, STDOUT), _Tail(process.stderr, STDERR))
    try:
        for thread in (feeder, *tails):
            thread.start()
        code = _waited(process, timeout)
    finally:
        _end(process)
        deadline = time.monotonic() + _LAST_WORDS
        for thread in (feeder, *tails):
            thread.join(max(0.0, deadline - time.monotonic()))
        with suppress(OSError):
            process.stdin.close()
    stdout, stderr = (tail.text() for tail in tails)
    return Output(code, stdout, stderr)


def run_guarded(command: Sequence[str], line: str, timeout: float, env: Mapping[str, str] | None = None) -> Output:
    """Run a command that reads one line, for at most `timeout` seconds, under `guard`: it cannot outlive this process.

    Its environment is this process's or `env`. Raises RuntimeFailedError where no process can be started.
    """
    guarded = (sys.executable, "-I", str(Path(guard.__file__)), str(timeout + _GRACE), *command)
    try:
        return run_process(guarded, line or "\n", timeout, hold=True, env=env)
    except OSError as error:
        raise RuntimeFailedError(f"no process can be started here: {error.strerror}; {sys.executable}") from None


class _Tail(Thread):
    """Reads a pipe to its end, so that its writer never waits, and keeps the last bytes."""

    def __init__(self, pipe: IO[bytes], limit: int) -> None:
        super().__init__(daemon=True)
        self._pipe = pipe
        self._limit = limit
        self._size = 0
        self._chunks: deque[bytes] = deque()

    def run(self) -> None:
        """Read."""
        with self._pipe:
            while chunk := os.read(self._pipe.fileno(), 1 << 16):
                self._chunks.append(chunk)
                self._size += len(chunk)
                while self._size - len(self._chunks[0]) >= self._limit:
                    self._size -= len(self._chunks.popleft())

    def text(self) -> str:
        """What was kept; bytes that are no UTF-8 are replaced."""
        return b"".join(tuple(self._chunks)).decode("utf-8", "replace")


def _start(command: Sequence[str], env: Mapping[str, str] | None) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    flags = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)  # Windows: Ctrl-C is ours alone
    return subprocess.Popen(
        list(command),
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        env=None if env is None else dict(env),
        start_new_session=os.name != "nt",
        creationflags=flags,
    )


def _waited(process: subprocess.Popen[bytes], timeout: float | None) -> int | None:
    """Its exit code, None where it did not end in time."""
    end = time.monotonic() + (math.inf if timeout is None else timeout)
    while (left := end - time.monotonic()) > 0:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(min(left, _LOOK))
    return process.poll()


def _feed(source: BinaryIO, sink: IO[bytes], hold: bool) -> None:
    with suppress(OSError, ValueError):  # it has ended, or reads nothing
        shutil.copyfileobj(source, sink, 1 << 20)
        if hold:
            sink.flush()
        else:
            sink.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the group, and wait for the process."""
    if os.name == "nt":
        if process.poll() is None:
            kill = ["taskkill", "/T", "/F", "/PID", str(process.pid)]
            subprocess.run(kill, capture_output=True, check=False)
    else:
        with suppress(ProcessLookupError, PermissionError):  # macOS: a group of zombies alone refuses
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
