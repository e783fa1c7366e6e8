"""A browser is many processes: what all of them take, by Linux' /proc. Elsewhere there are none to be seen."""

from __future__ import annotations

import os
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

from vlmedge.device_bench.memory import MB, LinuxMemory, Usage

_PROC = Path("/proc")


class Tree:
    """All processes that one process started, those that they started, and so on; without the first itself."""

    def __init__(self, root: int, proc: Path = _PROC) -> None:
        self._root, self._proc = root, proc

    def reset_peaks(self) -> None:
        """Let peaks begin anew; a process that does not permit it keeps its own, so the sum is an upper bound."""
        for pid in self.processes():
            LinuxMemory(self._proc / str(pid)).reset_peak()

    def usage(self) -> Usage:
        """Sums in MB (10^6 bytes), a page that several share counted in each; None where the system does not tell.

        The peak is the sum of each process's own, which need not have come at one time.
        """
        found = [LinuxMemory(self._proc / str(pid)).usage() for pid in self.processes()]
        names = ("resident", "peak", "anonymous", "mapped")
        return Usage(*(_sum([getattr(usage, name) for usage in found]) for name in names))

    def cpu_seconds(self) -> float:
        """Processor time so far, that of children that have ended included."""
        ticks = sum(sum(map(int, fields[13:17])) for fields in map(self._stat, self.processes()) if fields)
        return ticks / os.sysconf("SC_CLK_TCK")

    def processes(self) -> list[int]:
        """Their numbers, parents before children."""
        children = defaultdict(list)
        for pid in self._pids():
            if fields := self._stat(pid):
                children[int(fields[3])].append(pid)
        out: list[int] = []
        left = list(children[self._root])
        while left:
            out.append(left.pop())
            left += children[out[-1]]
        return out

    def _pids(self) -> list[int]:
        with suppress(OSError):
            return [int(entry.name) for entry in self._proc.iterdir() if entry.name.isdigit()]
        return []

    def _stat(self, pid: int) -> list[str]:
        """The fields of proc_pid_stat(5), counted from 0; none of a process that has ended."""
        try:
            text = (self._proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return []
        before, _, after = text.rpartition(")")  # the name may hold anything
        return [*before.split("(", 1), *after.split()]


def _sum(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / MB, 3) if known else None
