"""How busy the machine was with other things while something was measured."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path


def own_cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended and were waited for."""
    return sum(os.times()[:4])


class Others:
    """Counts the processor time of all other processes from its making on.

    What a hypervisor gave to others counts too. A container sees the whole machine. The system counts in ticks of 10 ms
    for each processor, so the time should be longer than a second.
    """

    def __init__(
        self,
        stat: Path = Path("/proc/stat"),
        own: Callable[[], float] = own_cpu_seconds,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._stat, self._own, self._clock = stat, own, clock
        self._start = self._now()

    def mean(self) -> float | None:
        """How many processors they have taken in mean; None where the system does not tell.

        /proc/stat is Linux's alone, and Android hides it from apps.
        """
        (busy, own, at), (busy_before, own_before, since) = self._now(), self._start
        if busy is None or busy_before is None or at <= since:
            return None
        return max(0.0, (busy - busy_before) - (own - own_before)) / (at - since)

    def _now(self) -> tuple[float | None, float, float]:
        return busy_seconds(self._stat), self._own(), self._clock()


def busy_seconds(stat: Path = Path("/proc/stat")) -> float | None:
    """Processor time of everything since the machine started, idle and waiting left out; None if it is not told.

    Fields of the first line as in proc_stat(5), in ticks: user nice system idle iowait irq softirq steal; guests' time
    is in user's.
    """
    try:
        words = stat.read_text(encoding="ascii").splitlines()[0].split()
        user, nice, system, _idle, _wait, *rest = map(int, words[1:9])
    except (OSError, ValueError, IndexError):
        return None
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
