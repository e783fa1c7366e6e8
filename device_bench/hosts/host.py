"""What a host does for the runner: bring a job's files there, run its process, hand back what it printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

from vlmedge.device_bench.job import Job
from vlmedge.device_bench.result import Reply

# runtime -> unit -> why it cannot be used there (one line, with the remedy), "" where it can.
Units: TypeAlias = Mapping[str, Mapping[str, str]]


_LOOPBACK: Final = frozenset(("localhost", "127.0.0.1", "::1", "[::1]"))


def machine_at(address: str, name: str) -> str:
    """`Host.machine` of what answers at an address: `name`, or "" where that is this machine itself."""
    return "" if address.lower() in _LOOPBACK else name


class Host(Protocol):
    """One machine that runs jobs, one at a time."""

    @property
    def name(self) -> str:
        """As it stands in records: "local", "ssh pi@10.0.0.5", ..."""

    @property
    def machine(self) -> str:
        """Hosts of one machine have the same, that of this machine is "": their jobs would disturb each other."""

    def open(self) -> None:
        """Connect, and put what jobs need there. Raises RuntimeFailedError where it cannot be reached or used."""

    def units(self) -> Units:
        """What can compute there."""

    def run(self, job: Job, timeout: float) -> Reply:
        """Run the job in a fresh process and return its reply; every failure is a reply with a status and a reason.

        Files that the job names (`Variant.source`, `Ask.picture`, `Job.truth`) are this machine's; a host that runs
        elsewhere copies them first, once, and rewrites the names. `timeout`: seconds, after which it is ended ("hung").
        """

    def close(self) -> None:
        """Let go; what was put there may stay for the next run."""


@dataclass(frozen=True, slots=True)
class Output:
    """How a process ended: its exit code (negative: the signal), None where it was ended after its time."""

    code: int | None
    stdout: str
    stderr: str
