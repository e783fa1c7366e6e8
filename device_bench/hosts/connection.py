"""One machine behind `ssh`: commands there, and what a failure of ssh means, in one line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO, Final

from vlmedge.device_bench.hosts.host import Output
from vlmedge.device_bench.hosts.process import run_process
from vlmedge.device_bench.outcome import last_line
from vlmedge.errors import RuntimeFailedError, UsageError

LOST: Final = 255  # ssh's exit code for its own failures; `guard` keeps it free
_LINES = 20  # of stderr: the longest that ssh says about one failure
# No questions, no terminal, nothing forwarded; a line that is dead for a minute is given up.
_SETTINGS = (
    "BatchMode=yes",
    "ConnectTimeout=15",
    "ServerAliveInterval=15",
    "ServerAliveCountMax=4",
    "RemoteCommand=none",
    "ClearAllForwardings=yes",
)
_REASONS = (
    ("IDENTIFICATION HAS CHANGED", "its host key has changed; find out why, then ssh-keygen -R its name"),
    ("Host key verification failed", "its host key is not known here; connect once by hand and confirm it: ssh {0}"),
    (
        "Permission denied|authentication failures",
        "the login is refused; put your key there (ssh-copy-id {0}) or load it (ssh-add)",
    ),
    ("Could not resolve hostname", "its name is not known; check the address, or ~/.ssh/config"),
    ("Connection refused", "nothing listens there; check the port, and that sshd runs"),
    (
        "timed out|No route to host|unreachable|not responding",
        "it does not answer; check that it is on, and the network",
    ),
)


class LostError(RuntimeFailedError):
    """ssh could not connect, or the connection broke."""


@dataclass(frozen=True, slots=True)
class Connection:
    """How to reach it. `port` and `config` (for ssh -F) are "" where ssh's own configuration is to decide.

    Raises UsageError for an address that ssh would take for something else.
    """

    address: str
    port: str = ""
    config: str = ""

    def __post_init__(self) -> None:
        """Refuse what is none."""
        if not re.fullmatch(r"[^\s\-][^\s]*", self.address):
            raise UsageError(
                f"an ssh device has an address, user@host or a Host of ~/.ssh/config, not '{self.address}'"
            )
        if self.port and not self.port.isdecimal():
            raise UsageError(f"a port is a number, not '{self.port}'")

    def command(self, words: Sequence[str]) -> list[str]:
        """What runs `words` there: each arrives as it is, whatever is in it."""
        settings = [word for setting in _SETTINGS for word in ("-o", setting)]
        options = [*(("-F", self.config) if self.config else ()), *(("-p", self.port) if self.port else ())]
        return ["ssh", "-T", "-x", "-a", *settings, *options, "--", self.address, shlex.join(words)]

    def call(
        self, words: Sequence[str], stdin: str | BinaryIO, timeout: float | None = None, *, hold: bool = False
    ) -> Output:
        """Run `words` there (`run_process` tells the rest). Raises RuntimeFailedError where there is no ssh."""
        try:
            return run_process(self.command(words), stdin, timeout, hold=hold)
        except OSError as error:
            raise RuntimeFailedError(f"ssh cannot be started: {error.strerror}; install OpenSSH's client") from None

    def failure(self, stderr: str) -> str:
        """What ssh's last words mean, and what to do."""
        said = "\n".join(stderr.splitlines()[-_LINES:])
        for pattern, meaning in _REASONS:
            if re.search(pattern, said):
                return f"ssh {self.address} fails: {meaning.format(self.address)}"
        return f"ssh {self.address} fails: {last_line(stderr) or 'the connection broke'}"
