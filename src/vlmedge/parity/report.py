"""What came of verifying a bundle: stages, their numbers and limits, the first that fails and its usual cause."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, Literal

from vlmedge.limits import Against
from vlmedge.records import encode

CLOSE = 0.7  # of the words; an export that chooses others more often is right, and another model in effect
SCHEMA: Final = "vlmedge.verification/1"
Outcome = Literal["passed", "failed", "measured", "skipped"]

# In the order in which a picture and a question go through a model.
STAGES = (
    "files",
    "facts",
    "prompt",
    "preprocess",
    "weights",
    "features",
    "projected",
    "logits",
    "tokens",
    "regions",
    "boxes",
)
TITLES = {
    "files": "files, by hash",
    "facts": "facts in the files",
    "prompt": "prompts and token ids",
    "preprocess": "preprocessing",
    "weights": "stored weights",
    "features": "vision features",
    "projected": "projected embeddings",
    "logits": "prefill logits",
    "tokens": "greedy tokens",
    "regions": "region heads",
    "boxes": "boxes and points",
}
AGAINST = {
    "stored": "the reference on the bundle's own weights, stage by stage on the same inputs: is the exporter right?",
    "original": "the original, end to end from the picture: what does quantization cost?",
}


@dataclass(frozen=True, slots=True)
class StageResult:
    """One stage of one comparison, or one check that needs no model.

    `against`: None for checks. `relative_rms`: norm of the difference over the norm of the reference; `max_abs`: the
    largest difference; `limit`: what `relative_rms` must not exceed (None: measured, not judged). `numbers`: what
    else is known at this stage: `kl_mean`, `kl_p99` (nats), `top1` (share), `positions`, `first_divergence`, `iou`, ...
    `ambiguous`: choices that differ at near ties. `why`: one line where the stage failed or was skipped.
    """

    stage: str
    against: Against | None
    outcome: Outcome
    relative_rms: float | None = None
    max_abs: float | None = None
    limit: float | None = None
    numbers: dict[str, float] | None = None
    ambiguous: int = 0
    why: str = ""


@dataclass(frozen=True, slots=True)
class TokenResult:
    """One teacher-forced position against the original: KL divergence in nats, both best tokens, by what margin."""

    reading: str
    index: int
    token: int
    reference_token: int
    kl: float
    margin: float
    ambiguous: bool


@dataclass(frozen=True, slots=True)
class PartResult:
    """What quantizing one part costs, all others being the original's, and what it saves.

    `part`: one of `attribution.PARTS`; "all": every part together; "runtime": the bundle itself, whose runtime rounds
    activations and the KV cache too. `bytes` as stored, `saved` beside the checkpoint's own. KL divergence in nats
    over `positions` tokens; `top1`: share of equal choices; `logits`: relative RMS; `iou`: mean overlap of boxes, None
    where the model has none. `right`: share of questions
    answered right, `lost` and `won` those that turned, beside the original; None where no questions were asked.
    """

    part: str
    weights: int
    bytes: int
    saved: int
    positions: int
    kl_mean: float
    kl_p99: float
    top1: float
    logits: float
    iou: float | None = None
    right: float | None = None
    lost: int | None = None
    won: int | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """A whole verification.

    `stages` in the order of STAGES, "stored" before "original". `limits`: comparison -> why its limits are what they
    are. `failing`: index into `stages` of the first that failed, None where none did; `cause`: what usually causes a
    failure there. `notes`: what could not be compared and why. `parts`: what each costs, where that was asked for.
    """

    schema: Literal["vlmedge.verification/1"]
    bundle: str
    family: str
    format: str
    flavour: str
    profile: str
    bytes: int
    bits_per_weight: float
    runtime: str
    source: str
    pictures: int
    stages: tuple[StageResult, ...]
    tokens: tuple[TokenResult, ...]
    limits: dict[str, str]
    failing: int | None
    cause: str
    notes: tuple[str, ...]
    seconds: float
    peak_rss_mb: float | None
    environment: dict[str, str]
    parts: tuple[PartResult, ...] = ()

    @property
    def passed(self) -> bool:
        """Did no stage fail?"""
        return self.failing is None

    @property
    def agreement(self) -> float | None:
        """The share of words that the original would choose too; None where it was not asked."""
        found = [s for s in self.stages if s.stage == "tokens" and s.against == "original" and s.numbers]
        return (found[0].numbers or {}).get("top1") if found else None

    @property
    def close(self) -> bool:
        """Does it also answer as the original does? A right export of few bits may not."""
        return self.passed and (self.agreement is None or self.agreement >= CLOSE)

    def as_dict(self) -> dict[str, Any]:
        """JSON data."""
        data: dict[str, Any] = _finite(encode(self))
        return data

    def summary(self) -> dict[str, Any]:
        """What a manifest keeps: the stages, with three digits, since the last ones differ from machine to machine.

        Nothing of time or place is in it: two exports on one machine are equal byte by byte.
        """
        compared = dict.fromkeys(s.against for s in self.stages if s.against is not None)
        return {
            "verified": self.passed and bool(compared),
            "against": [AGAINST[against] for against in compared],
            "stages": [_rounded(encode(stage)) for stage in self.stages],
            "limits": self.limits,
            **({"notes": list(self.notes)} if self.notes else {}),
        }


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: None says that there is no number."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items() if key != "kind" and item not in (None, "", {})}
    return float(f"{value:.2e}") if isinstance(value, float) else value
