"""A session that passes every call on to another; who stands between overrides what it is there for."""

from __future__ import annotations

from typing import Any

from vlmedge.session import F32, I32, U8, Grid, Session, Step


class Relay:
    """A `Session` before a real one."""

    def __init__(self, session: Session) -> None:
        self._session = session
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
        self, inputs: F32 | I32, *, bidirectional: bool = False, hidden: bool = False, every: bool = False
    ) -> Step:
        """Append positions."""
        return self._session.forward(inputs, bidirectional=bidirectional, hidden=hidden, every=every)

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
