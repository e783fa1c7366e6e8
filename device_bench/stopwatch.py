"""A session that notes when its calls ended, and what they took in."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from vlmedge.relay import Relay
from vlmedge.session import F32, I32, U8, Session, Step


@dataclass(frozen=True, slots=True)
class Call:
    """One call: "vision" of `size` crops or "forward" of `size` positions; `end` in seconds of `perf_counter`."""

    name: str
    size: int
    end: float


class Stopwatch(Relay):
    """Passes every call on; `calls` are those since `reset`. It adds one reading of a clock to a call."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.calls: list[Call] = []

    def reset(self) -> None:
        """Forget the calls so far."""
        self.calls = []

    def vision(self, pixels: U8) -> F32:
        """Encode crops."""
        out = self._session.vision(pixels)
        self.calls.append(Call("vision", len(pixels), time.perf_counter()))
        return out

    def forward(self, inputs: F32 | I32, **how: Any) -> Step:
        """Append positions."""
        out = self._session.forward(inputs, **how)
        self.calls.append(Call("forward", len(inputs), time.perf_counter()))
        return out
