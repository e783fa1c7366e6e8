"""An export and its original side by side, stage by stage: where do the models part?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vlmedge.parity.original import Judgement, Original
from vlmedge.parity.trace import Reading, Trace
from vlmedge.session import F32

TOKENS = "greedy tokens"
# The logits' difference is known at the first token and varies from token to token.
_NOISE = 4


@dataclass(frozen=True, slots=True)
class StageResult:
    """The worst difference of one stage: relative RMS, and the largest single one."""

    stage: str
    relative_rms: float
    max_abs: float


@dataclass(frozen=True, slots=True)
class Failure:
    """A stage that does not agree, and why, for a message."""

    stage: str
    why: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of comparing.

    `tokens` greedy tokens were compared; `first_divergence` is the index of the first different one, None where none
    differs; `near_tie`: the original's best two were closer there than the logits' difference explains. A difference
    that is no near tie is told before one that is.
    """

    stages: tuple[StageResult, ...]
    tokens: int
    first_divergence: int | None
    near_tie: bool

    def failing(self, tolerance: Mapping[str, float], *, lossless: bool = False) -> Failure | None:
        """The first stage that does not agree, else None.

        A stage without a tolerance fails only where its numbers are not finite. `lossless`: weights are stored as
        floats, so the greedy tokens must be the original's too, but for near ties.
        """
        for result in self.stages:
            most, found = tolerance.get(result.stage, math.inf), result.relative_rms
            if not math.isfinite(found):
                return Failure(result.stage, "numbers are not finite or of another shape")
            if found > most:
                return Failure(result.stage, f"relative RMS {found:.1e}, at most {most:.1e} is allowed")
        if lossless and self.first_divergence is not None and not self.near_tie:
            return Failure(TOKENS, f"token {self.first_divergence} is another, and not for a near tie")
        return None

    def as_dict(self) -> dict[str, Any]:
        """JSON data; numbers have three digits, the last ones differ from machine to machine."""
        data = asdict(self)
        for stage in data["stages"]:
            for key in ("relative_rms", "max_abs"):
                stage[key] = float(f"{stage[key]:.2e}")
        return data


def compare(ours: Trace, original: Original) -> Comparison:
    """Compare an export's trace with what the original makes of the same inputs."""
    readings = ((ours.small, original.small), (ours.stitched, original.stitched))
    pairs = {
        "features": [(ours.features, original.features), (ours.local, original.local)],
        "projected": [(a.projected, b.projected) for a, b in readings],
        "logits": [(a.logits, b.logits) for a, b in readings],
    }
    if original.regions:
        pairs["regions"] = [(ours.regions[name], wanted) for name, wanted in original.regions.items()]
    stages = tuple(StageResult(name, *max(difference(a, b) for a, b in arrays)) for name, arrays in pairs.items())
    partings = [parting for a, b in readings for parting in _partings(a, b)]
    first = min(partings, key=lambda parting: parting[1], default=None)
    total = sum(len(reading.tokens) for reading, _ in readings)
    return Comparison(stages, total, first[0] if first else None, first[1] if first else False)


def difference(ours: F32, theirs: F32) -> tuple[float, float]:
    """Relative RMS (the norm of the difference over the norm of the original) and the largest absolute difference."""
    if ours.shape != theirs.shape or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return float("inf"), float("inf")
    scale = float(np.linalg.norm(theirs.astype(np.float64))) or 1.0
    delta = ours.astype(np.float64) - theirs
    return float(np.linalg.norm(delta)) / scale, float(np.abs(delta).max(initial=0.0))


def _partings(ours: Reading, original: Judgement) -> list[tuple[int, bool]]:
    """Indices of different tokens, and whether the original was undecided there; it saw the export's own tokens."""
    noise = _NOISE * float(np.abs(ours.logits - original.logits).max())
    pairs = enumerate(zip(ours.tokens, original.choices, strict=True))
    return [(i, original.gaps[i] <= noise) for i, (a, b) in pairs if a != b]
