"""A session that notes when each of its calls began and ended, and what it took in."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from vlmedge.relay import Relay
from vlmedge.session import F32, I32, U8, Grid, Session, Step


@dataclass(frozen=True, slots=True)
class Call:
    """One call: "vision" of `size` crops, "project", or "forward" of `size` positions; seconds of `perf_counter`."""

    name: str
    size: int
    start: float
    end: float

    @property
    def ms(self) -> float:
        """Milliseconds."""
        return (self.end - self.start) * 1000


class Stopwatch(Relay):
    """Passes every call on; `calls` are those since `reset`. It adds two readings of a clock to a call."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.calls: list[Call] = []

    def reset(self) -> None:
        """Forget the calls so far."""
        self.calls = []

    def vision(self, pixels: U8) -> F32:
        """Encode crops."""
        start = time.perf_counter()
        out = self._session.vision(pixels)
        self._note("vision", len(pixels), start)
        return out

    def project(self, features: F32, tiling: Grid) -> F32:
        """Project one picture's features."""
        start = time.perf_counter()
        out = self._session.project(features, tiling)
        self._note("project", len(features), start)
        return out

    def forward(self, inputs: F32 | I32, **how: Any) -> Step:
        """Append positions."""
        start = time.perf_counter()
        out = self._session.forward(inputs, **how)
        self._note("forward", len(inputs), start)
        return out

    def _note(self, name: str, size: int, start: float) -> None:
        self.calls.append(Call(name, size, start, time.perf_counter()))
