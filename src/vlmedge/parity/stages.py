"""An export and its original side by side, stage by stage: where do the models part?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vlmedge.parity.original import Judgement, Original
from vlmedge.parity.trace import Reading, Trace
from vlmedge.session import F32


@dataclass(frozen=True, slots=True)
class StageResult:
    """The worst difference of one stage: relative RMS, and the largest single one."""

    stage: str
    relative_rms: float
    max_abs: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of comparing.

    `tokens` greedy tokens were compared; `first_divergence` is the index of the first different one, None where none
    differs; `near_tie`: there the original's best two were closer than twice the logits' difference.
    """

    stages: tuple[StageResult, ...]
    tokens: int
    first_divergence: int | None
    near_tie: bool

    def failing(self, tolerance: Mapping[str, float]) -> StageResult | None:
        """The first stage whose relative RMS exceeds its tolerance, else None."""
        limits = ((result, tolerance.get(result.stage)) for result in self.stages)
        return next((result for result, most in limits if most is not None and not result.relative_rms <= most), None)

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
        "pixels": [(ours.pixels, original.pixels)],
        "features": [(ours.features, original.features), (ours.local, original.local)],
        "projected": [(a.projected, b.projected) for a, b in readings],
        "logits": [(a.logits, b.logits) for a, b in readings],
    }
    stages = tuple(StageResult(name, *max(difference(a, b) for a, b in arrays)) for name, arrays in pairs.items())
    partings = [_parting(a, b) for a, b in readings]
    first = next((p for p in partings if p is not None), None)
    total = sum(len(reading.tokens) for reading, _ in readings)
    return Comparison(stages, total, first[0] if first else None, first[1] if first else False)


def difference(ours: F32, theirs: F32) -> tuple[float, float]:
    """Relative RMS (the norm of the difference over the norm of the original) and the largest absolute difference."""
    if ours.shape != theirs.shape or not np.isfinite(ours).all():
        return float("inf"), float("inf")
    scale = float(np.linalg.norm(theirs.astype(np.float64))) or 1.0
    delta = ours.astype(np.float64) - theirs
    return float(np.linalg.norm(delta)) / scale, float(np.abs(delta).max(initial=0.0))


def _parting(ours: Reading, original: Judgement) -> tuple[int, bool] | None:
    """Index of the first different token, and whether the original was undecided there."""
    pairs = zip(ours.tokens, original.choices, strict=True)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if at is None:
        return None
    noise = float(np.abs(ours.logits - original.logits).max())
    return at, original.gaps[at] <= 2 * noise
