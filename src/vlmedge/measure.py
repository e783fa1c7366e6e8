"""Time and memory of this process."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Named durations in milliseconds."""

    def __init__(self) -> None:
        self.timings: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timings[name] = self.timings.get(name, 0.0) + (time.perf_counter() - start) * 1000

    def mark(self, name: str) -> None:
        """Record the time since the clock was made, once."""
        self.timings.setdefault(name, (time.perf_counter() - self._start) * 1000)

    def rounded(self) -> dict[str, float]:
        """Durations to a microsecond."""
        return {name: round(value, 3) for name, value in self.timings.items()}


def peak_rss_mb() -> float | None:
    """This process's peak resident set in MB (10^6 bytes), None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)
