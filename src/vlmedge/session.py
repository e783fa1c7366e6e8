"""What a runtime implements: five steps over numpy arrays, in one conversation with one KV cache.

Tiling, stitching order, prompts, sampling, skills and timing are shared code above this protocol, so every
runtime and the original run the same loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

F32: TypeAlias = npt.NDArray[np.float32]
I32: TypeAlias = npt.NDArray[np.int32]
U8: TypeAlias = npt.NDArray[np.uint8]
Grid: TypeAlias = tuple[int, int]

# Positions of a call up to which a decoder's own weights are used where a bundle has a second copy for prefill.
PREFILL_OVER = 8


@dataclass(frozen=True, slots=True)
class Step:
    """What one forward call returns.

    `logits`: float32 [vocab] of the last position, or [n, vocab] where all were asked for.
    `hidden`: float32 [width] of the last position before the final norm, where it was asked for.
    """

    logits: F32
    hidden: F32 | None = None


class Session(Protocol):
    """One model opened by one runtime. Not for use from several threads at once."""

    runtime: str

    @property
    def position(self) -> int:
        """Positions in the KV cache."""

    @property
    def context(self) -> int:
        """Positions that the KV cache can hold."""

    def vision(self, pixels: U8) -> F32:
        """Encode crops: uint8 [n, size, size, 3] (RGB) -> features float32 [n, tokens, width].

        Normalisation is part of this step: runtimes that take bytes do it themselves.
        """

    def project(self, features: F32, tiling: Grid) -> F32:
        """Features of one picture's crops -> decoder embeddings float32 [image_tokens, width]."""

    def embed(self, ids: I32) -> F32:
        """Token ids int32 [n] -> embeddings float32 [n, width]."""

    def forward(
        self, inputs: F32 | I32, *, bidirectional: bool = False, hidden: bool = False, every: bool = False
    ) -> Step:
        """Append positions to the KV cache and return the logits.

        `inputs`: embeddings float32 [n, width] or token ids int32 [n]. `bidirectional`: these positions
        all see each other. `hidden`: return the last hidden state too. `every`: logits of all n positions.
        """

    def head(self, name: str, inputs: F32) -> F32:
        """Run a region head on one vector: `coord_encoder` (features), `coord_decoder` (hidden), ..."""

    def rewind(self, position: int) -> None:
        """Forget every position from `position` on."""

    def info(self) -> dict[str, Any]:
        """Facts for reports: versions, `threads`, and `unit`, what computes."""

    def close(self) -> None:
        """Free native memory; the session must not be used afterwards."""
