"""Joules from a counter that adds up by itself, or from watts that are sampled."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from vlmedge.errors import RuntimeFailedError

SAMPLED = 0.1  # seconds between two readings of watts
COUNTED = 10.0  # of a counter that adds up: often enough for the smallest to wrap around once at most


class Meter(Protocol):
    """Something that measures energy from a start to a stop; then it can be started again."""

    @property
    def name(self) -> str:
        """What is read: "rapl: package-0, dram"."""

    def start(self) -> None:
        """Begin at zero."""

    def stop(self) -> float:
        """Joules since the start. Raises RuntimeFailedError where the counter failed meanwhile."""


class Source(Protocol):
    """What a meter reads again and again. Both methods may raise OSError, ValueError or RuntimeFailedError."""

    def begin(self, now: float) -> None:
        """First reading, at `now` seconds."""

    def take(self, now: float) -> None:
        """Another reading."""

    @property
    def joules(self) -> float:
        """From the first reading to the last."""


@dataclass(frozen=True, slots=True)
class Register:
    """One counter: `read` gives a number of which each is worth `joules`; behind `highest` it goes on at 0.

    `highest` 0: it never does.
    """

    read: Callable[[], int]
    joules: float
    highest: int = 0


class Counted:
    """A `Source` of registers, added up."""

    def __init__(self, registers: Sequence[Register]) -> None:
        self._registers, self._last, self.joules = registers, [0] * len(registers), 0.0

    def begin(self, now: float) -> None:
        """Remember where the registers stand."""
        self._last, self.joules = [register.read() for register in self._registers], 0.0

    def take(self, now: float) -> None:
        """Add what they have gained."""
        for i, register in enumerate(self._registers):
            value = register.read()
            gained = value - self._last[i]
            if gained < 0 and not register.highest:
                raise RuntimeFailedError("the energy counter was set back meanwhile; run the job again")
            self.joules += (gained + (register.highest if gained < 0 else 0)) * register.joules
            self._last[i] = value


class Sampled:
    """A `Source` of watts; between two readings the power is taken to go in a straight line."""

    def __init__(self, watts: Callable[[], float]) -> None:
        self._watts, self._last, self.joules = watts, (0.0, 0.0), 0.0

    def begin(self, now: float) -> None:
        """Remember the power."""
        self._last, self.joules = (now, self._watts()), 0.0

    def take(self, now: float) -> None:
        """Add the energy since the last reading."""
        (since, before), watts = self._last, self._watts()
        self.joules += (now - since) * (before + watts) / 2
        self._last = now, watts


class Watched:
    """A `Meter` that reads its source every `period` seconds, in a thread of its own, and when it is stopped."""

    def __init__(
        self, name: str, source: Source, period: float, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._name, self._source, self._period, self._clock = name, source, period, clock
        self._over, self._failure = threading.Event(), ""
        self._thread: threading.Thread | None = None

    @property
    def name(self) -> str:
        """What is read."""
        return self._name

    def start(self) -> None:
        """Read for the first time, and go on."""
        self._over, self._failure = threading.Event(), ""
        self._try(self._source.begin)
        self._thread = threading.Thread(target=self._watch, args=(self._over,), daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """Read for the last time: joules. Raises RuntimeFailedError where a reading failed."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        self._try(self._source.take)
        if self._failure:
            raise RuntimeFailedError(self._failure)
        return self._source.joules

    def _watch(self, over: threading.Event) -> None:
        while not self._failure and not over.wait(self._period):
            self._try(self._source.take)

    def _try(self, reading: Callable[[float], None]) -> None:
        if self._failure:
            return
        try:
            reading(self._clock())
        except RuntimeFailedError as error:
            self._failure = str(error)
        except (OSError, ValueError) as error:
            self._failure = f"{self._name} could not be read to the end: {error}; run the job again"


class Together:
    """Several meters as one: of parts that do not overlap."""

    def __init__(self, meters: Sequence[Meter]) -> None:
        self._meters = meters

    @property
    def name(self) -> str:
        """All that is read."""
        return " + ".join(meter.name for meter in self._meters)

    def start(self) -> None:
        """Start all."""
        for meter in self._meters:
            meter.start()

    def stop(self) -> float:
        """Stop all: the sum."""
        return sum([meter.stop() for meter in self._meters])
