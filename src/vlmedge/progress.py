"""How long work tells what it is doing; the command line draws it, a library call is silent."""

from __future__ import annotations


class Progress:
    """Told of stages and of the steps done in them. This one stays silent."""

    @property
    def quiet(self) -> bool:
        """Should libraries that draw progress of their own stay silent too?"""
        return True

    def stage(self, text: str, total: int | None = None) -> None:
        """A stage begins; `total` is its size in steps, where it is known."""

    def advance(self, steps: int) -> None:
        """So many steps of the stage are done."""

    def note(self, text: str) -> None:
        """Something the user should read."""
