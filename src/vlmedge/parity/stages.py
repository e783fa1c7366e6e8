"""Two models side by side, stage by stage, on the same pictures: where do they part?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vlmedge.parity.pictures import pattern, sizes
from vlmedge.session import F32
from vlmedge.skills import Model
from vlmedge.spec import Ids

STAGES = ("pixels", "features", "projected", "logits")
_TOKENS = 16


@dataclass(frozen=True, slots=True)
class StageResult:
    """The worst difference of one stage over all pictures: relative RMS, and the largest single one."""

    stage: str
    relative_rms: float
    max_abs: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of comparing. `first_divergence`: index of the first different greedy token, None where none differs.

    `near_tie`: that decision was closer, in the original, than the difference of the logits.
    """

    stages: tuple[StageResult, ...]
    tokens: int
    first_divergence: int | None
    near_tie: bool

    def failing(self, tolerance: Mapping[str, float]) -> str | None:
        """The first stage whose relative RMS exceeds its tolerance, else None."""
        for result in self.stages:
            if result.relative_rms > tolerance.get(result.stage, float("inf")):
                return result.stage
        return None

    def as_dict(self) -> dict[str, Any]:
        """JSON data, numbers rounded to three digits (they differ in the last ones from machine to machine)."""
        data = asdict(self)
        for stage in data["stages"]:
            for key in ("relative_rms", "max_abs"):
                stage[key] = float(f"{stage[key]:.2e}")
        return data


def compare(model: Model, original: Model) -> Comparison:
    """Compare the stages of a prefill and greedy tokens after it, on one small and one large picture."""
    worst: dict[str, tuple[float, float]] = dict.fromkeys(STAGES, (0.0, 0.0))
    divergence, near, tokens = None, False, 0
    for height, width in sizes(model.spec.image):
        picture, ids = pattern(height, width), prompt_ids(model)
        ours, theirs = model.stages([picture], ids), original.stages([picture], ids)
        for stage in STAGES:
            worst[stage] = max(worst[stage], difference(ours[stage], theirs[stage]))
        noise = float(np.abs(ours["logits"][-1] - theirs["logits"][-1]).max())
        name = caption_length(model)
        got = model.caption(picture, name, max_tokens=_TOKENS).tokens
        want = original.caption(picture, name, max_tokens=_TOKENS).tokens
        tokens += len(want)
        at = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), None)
        if at is not None and divergence is None:
            divergence, near = at, _is_near_tie(original, picture, [*ids, *want[:at]], got[at], noise)
    results = tuple(StageResult(stage, *worst[stage]) for stage in STAGES)
    return Comparison(results, tokens, divergence, near)


def difference(ours: F32, theirs: F32) -> tuple[float, float]:
    """Relative RMS (the norm of the difference over the norm of the original) and the largest absolute difference."""
    if ours.shape != theirs.shape:
        return float("inf"), float("inf")
    scale = float(np.linalg.norm(theirs.astype(np.float64))) or 1.0
    delta = ours.astype(np.float64) - theirs
    return float(np.linalg.norm(delta)) / scale, float(np.abs(delta).max(initial=0.0))


def caption_length(model: Model) -> str:
    """The caption that tests ask for."""
    names = [n.partition("/")[2] for n in model.spec.prompt.templates if n.startswith("caption/")]
    return "short" if "short" in names else names[0]


def prompt_ids(model: Model) -> list[int]:
    """Token ids behind the picture in that caption's template."""
    template = model.spec.prompt.templates[f"caption/{caption_length(model)}"]
    return [i for part in template[1:] if isinstance(part, Ids) for i in part.ids]


def _is_near_tie(original: Model, picture: Any, ids: list[int], chosen: int, noise: float) -> bool:
    logits = original.stages([picture], ids)["logits"][-1]
    return float(logits.max() - logits[chosen]) <= 2 * noise
