"""How far an export may be from what it is compared with; declared in profiles, carried by bundles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Against = Literal["stored", "original"]


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest relative RMS difference that an export may show, stage by stage, and why it is that large.

    `against` "stored": beside the reference on the export's own weights, each stage on the same inputs: what the
    runtime's arithmetic costs. "original": beside the checkpoint, from the pixels on: what quantization costs too.
    A stage that is None is measured and not judged. `formats`: those whose runtimes it is for; empty: all others.
    """

    against: Against
    reason: str
    features: float | None = None
    projected: float | None = None
    logits: float | None = None
    regions: float | None = None
    formats: tuple[str, ...] = ()
