"""Energy: which counter of this machine is read, and joules over a block."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

from vlmedge.device_bench.energy import battery, jetson, powermetrics, rapl
from vlmedge.device_bench.energy.meter import Meter
from vlmedge.device_bench.energy.nvidia import find as find_nvidia
from vlmedge.device_bench.job import ON_PROCESSOR
from vlmedge.device_bench.result import Energy
from vlmedge.errors import RuntimeFailedError

# A counter that can be read, why it cannot, or "" where the machine has none of its kind.
Find: TypeAlias = Callable[[], Meter | str]

COUNTERS: Mapping[str, Find] = {
    "jetson": jetson.find,  # the whole board
    "rapl": rapl.find,  # processor packages and their memory
    "nvidia": find_nvidia,  # GPUs, with the packages where they can be read
    "powermetrics": powermetrics.find,  # a Mac's processor, GPU and neural engine
    "battery": battery.find,  # the whole device, screen included, in coarse steps: the last resort
}
# The counters that see the processor, the best first; and those that see any GPU or neural unit, which packages do not.
PROCESSOR = ("jetson", "rapl", "powermetrics", "battery")
OTHER = ("jetson", "nvidia", "powermetrics", "battery")


def meter(unit: str = "cpu", counters: Mapping[str, Find] = COUNTERS) -> Meter | str:
    """The best counter for what computes, or one line that says why there is none and what to do.

    `unit`: as `Variant.unit`.
    """
    reasons = []
    for name in PROCESSOR if unit in ON_PROCESSOR else OTHER:
        found = counters[name]()
        if not isinstance(found, str):
            return found
        reasons += [found] if found else []
    return "; ".join(reasons) or f"no energy counter for '{unit}' is known here; virtual machines hide the processor's"


@dataclass(slots=True)
class Reading:
    """What a block took; `joules` None with the reason where it was not measured. Filled when the block ends."""

    counter: str = ""
    joules: float | None = None
    seconds: float = 0.0
    reason: str = ""

    def energy(self, answers: int) -> Energy:
        """As it stands in replies, for a block in which so many answers were given."""
        each = self.joules / answers if self.joules is not None and answers else None
        return Energy(self.joules, each, self.seconds, self.counter, self.reason)


@contextmanager
def metered(found: Meter | str, clock: Callable[[], float] = time.perf_counter) -> Iterator[Reading]:
    """Measure the block with what `meter()` found; a counter that fails on the way is a reason, not an error."""
    running = None if isinstance(found, str) else found
    reading = Reading(reason=found) if isinstance(found, str) else Reading(found.name)
    if running is not None:
        running.start()
    start = clock()
    try:
        yield reading
    finally:
        reading.seconds = clock() - start
        if running is not None:
            try:
                reading.joules = running.stop()
            except RuntimeFailedError as error:
                reading.reason = str(error)
