"""A session that stands before a real one, for faults to override."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from vlmedge.bundle import Bundle
from vlmedge.session import F32, I32, U8, Grid, Session, Step

Inputs: TypeAlias = F32 | I32


@dataclass(frozen=True, slots=True)
class How:
    """How positions are appended: the options of `Session.forward`."""

    bidirectional: bool = False
    hidden: bool = False
    every: bool = False


class Passing:
    """A `Session` that passes every call on; faults override one of them."""

    def __init__(self, session: Session, bundle: Bundle) -> None:
        """Stand before `session`, which runs `bundle`."""
        self._session, self._bundle = session, bundle
        self.runtime = session.runtime

    @property
    def position(self) -> int:
        """Positions in the KV cache."""
        return self._session.position

    @property
    def context(self) -> int:
        """Positions that the KV cache can hold."""
        return self._session.context

    def vision(self, pixels: U8) -> F32:
        """Encode crops."""
        return self._session.vision(pixels)

    def project(self, features: F32, tiling: Grid) -> F32:
        """Project one picture's features."""
        return self._session.project(features, tiling)

    def embed(self, ids: I32) -> F32:
        """Embed token ids."""
        return self._session.embed(ids)

    def forward(
        self, inputs: Inputs, *, bidirectional: bool = False, hidden: bool = False, every: bool = False
    ) -> Step:
        """Append positions."""
        return self.step(inputs, How(bidirectional, hidden, every))

    def step(self, inputs: Inputs, how: How) -> Step:
        """Append positions; what faults override."""
        return self._session.forward(inputs, bidirectional=how.bidirectional, hidden=how.hidden, every=how.every)

    def head(self, name: str, inputs: F32) -> F32:
        """Run a region head."""
        return self._session.head(name, inputs)

    def rewind(self, position: int) -> None:
        """Forget every position from `position` on."""
        self._session.rewind(position)

    def info(self) -> dict[str, Any]:
        """Facts of the session behind it."""
        return self._session.info()

    def close(self) -> None:
        """Free the session behind it."""
        self._session.close()
