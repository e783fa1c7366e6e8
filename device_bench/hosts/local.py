"""This machine as a host: a job is a child process."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from vlmedge.device_bench.hosts.host import Units
from vlmedge.device_bench.hosts.process import run_guarded
from vlmedge.device_bench.job import Job
from vlmedge.device_bench.outcome import read_reply, read_units
from vlmedge.device_bench.result import Reply
from vlmedge.errors import RuntimeFailedError
from vlmedge.records import encode

if TYPE_CHECKING:
    from vlmedge.device_bench.device import Device

WORKER: Final = ("-P", "-m", "vlmedge.device_bench.worker")  # -P: the folder that one stands in is no place of modules
UNITS: Final = "--units"
UNITS_TIME: Final = 120.0  # seconds: every runtime is imported, on a slow disk too


class LocalHost:
    """Runs jobs here, with the Python that runs this, or with another worker's `command`."""

    def __init__(self, device: Device, command: Sequence[str] | None = None) -> None:
        self._command = tuple(command) if command else (sys.executable, *WORKER)

    @property
    def name(self) -> str:
        """As it stands in records."""
        return "local"

    @property
    def machine(self) -> str:
        """This one."""
        return ""

    def open(self) -> None:
        """Nothing is needed."""

    def units(self) -> Units:
        """What can compute here. Raises RuntimeFailedError where the worker does not tell."""
        return read_units(run_guarded((*self._command, UNITS), "", UNITS_TIME), timeout=UNITS_TIME)

    def run(self, job: Job, timeout: float) -> Reply:
        """Run the job in a fresh process. It ends with this one, also where this one is killed."""
        try:
            return read_reply(run_guarded(self._command, job_line(job), timeout), timeout=timeout)
        except RuntimeFailedError as error:
            return Reply("failed", str(error))

    def close(self) -> None:
        """Nothing was kept."""


def job_line(job: Job) -> str:
    """What a worker reads: the job as one line of JSON."""
    return json.dumps(encode(job)) + "\n"
