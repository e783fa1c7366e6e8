"""A session that stands before a real one, for faults to override."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from vlmedge.bundle import Bundle
from vlmedge.relay import Relay
from vlmedge.session import F32, I32, Session, Step

Inputs: TypeAlias = F32 | I32


@dataclass(frozen=True, slots=True)
class How:
    """How positions are appended: the options of `Session.forward`."""

    bidirectional: bool = False
    hidden: bool = False
    every: bool = False


class Passing(Relay):
    """A `Session` that passes every call on; faults override one of them."""

    def __init__(self, session: Session, bundle: Bundle) -> None:
        """Stand before `session`, which runs `bundle`."""
        super().__init__(session)
        self._bundle = bundle

    def forward(
        self, inputs: Inputs, *, bidirectional: bool = False, hidden: bool = False, every: bool = False
    ) -> Step:
        """Append positions."""
        return self.step(inputs, How(bidirectional, hidden, every))

    def step(self, inputs: Inputs, how: How) -> Step:
        """Append positions; what faults override."""
        return self._session.forward(inputs, bidirectional=how.bidirectional, hidden=how.hidden, every=how.every)
