"""Is the machine as fast as at the start? Anchors are held against the first ones; where not, it may rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from vlmedge.device_bench.result import Ceiling

# llama.cpp's tuner for Metal does the same: an anchor every 4 candidates, 10 % is too far, 3 % is near enough again.
EVERY: Final = 4  # jobs between two anchors
FAR: Final = 0.10
NEAR: Final = 0.03
FIRST: Final = 3  # anchors that the others are held against: their median
PAUSE: Final = 5.0  # seconds of the first pause, each next one is twice as long
PAUSES: Final = 60.0  # ... and of all together


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds that only go on, and sleeping; a test has its own."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


@dataclass(slots=True)
class Baseline:
    """The first anchors of one device with one number of threads, and what the later ones are in comparison."""

    first: list[Ceiling] = field(default_factory=list)
    last: float = 0.0  # the last drift

    def drift(self, ceiling: Ceiling) -> float:
        """How much slower it is than the median of the first ones, by what fell behind most (0.03: 3 %).

        It becomes one of the first itself, where they are fewer than three and it is no sign of a machine that slows
        down or recovers. The first gives 0.
        """
        drift = max((1 - rate / usual for rate, usual in self._pairs(ceiling) if usual > 0), default=0.0)
        if len(self.first) < FIRST and max(drift, self.last) <= FAR:
            self.first.append(ceiling)
        self.last = drift
        return drift

    def _pairs(self, ceiling: Ceiling) -> Iterator[tuple[float, float]]:
        """(rate, the first ones' median) of the bandwidth and of each product that all of them have."""
        if not self.first:
            return
        yield ceiling.bandwidth, median(c.bandwidth for c in self.first)
        for kind, rate in ceiling.gemm.items():
            if all(kind in c.gemm for c in self.first):
                yield rate, median(c.gemm[kind] for c in self.first)


def rest(measure: Callable[[], float | None], clock: Clock) -> float | None:
    """Pause 5, 10, 20, ... seconds, at most 60 in all, until `measure` says that the drift is at most 3 %.

    Returns the last drift, None where it could not be measured any more.
    """
    pause, left = PAUSE, PAUSES
    drift: float | None = None
    while left > 0:
        clock.sleep(min(pause, left))
        left -= pause
        pause *= 2
        drift = measure()
        if drift is None or drift <= NEAR:
            break
    return drift
