"""Several training processes on one machine that average their gradients through shared memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from multiprocessing.synchronize import Barrier
from typing import Any

import torch
import torch.multiprocessing as processes
from torch import Tensor, nn

_PATIENCE = 600.0  # seconds until a process gives up on one that died


@dataclass(frozen=True, slots=True)
class Team:
    """One process's view: its `rank` of `size`; `board` float32 [size, numbers] is shared, `gate` lets all meet."""

    rank: int
    size: int
    board: Tensor | None = None
    gate: Barrier | None = None

    @classmethod
    def of(cls, size: int, parameters: int) -> Team:
        """A team for so many parameters, to be handed to the processes."""
        context: Any = processes.get_context("spawn")
        board = torch.zeros(size, parameters + 1)
        board.share_memory_()  # type: ignore[no-untyped-call]
        return cls(0, size, board, context.Barrier(size))

    def as_rank(self, rank: int) -> Team:
        """The same team as seen by another member."""
        return replace(self, rank=rank)

    def average(self, parameters: list[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the team."""
        if self.board is None or self.gate is None:
            return
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        torch.cat([g.reshape(-1) for g in gradients], out=self.board[self.rank, :-1])
        self.gate.wait(_PATIENCE)
        mean = self.board[:, :-1].mean(0)
        self.gate.wait(_PATIENCE)
        for p, part in zip(parameters, torch.split(mean, [p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)

    def agree(self, value: float) -> float:
        """The largest value of the team."""
        if self.board is None or self.gate is None:
            return value
        self.board[self.rank, -1] = value
        self.gate.wait(_PATIENCE)
        largest = float(self.board[:, -1].max())
        self.gate.wait(_PATIENCE)
        return largest
