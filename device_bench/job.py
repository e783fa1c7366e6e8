"""A job: one model, one way to run it, and what it is asked, as plain data that means the same on every machine."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Final, Literal

from vlmedge.records import encode

# measure: rounds of the same questions. sustain: the same without a pause, for minutes. reference: what the original
# answers. anchor: the machine's ceilings, no model at all.
JobKind = Literal["measure", "sustain", "reference", "anchor"]
# Units that are the processor itself: its ceilings and its energy are theirs, and threads mean something.
ON_PROCESSOR: Final = frozenset(("cpu", "wasm", "xnnpack", "dnnl"))


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of the table: a model and how it is run.

    `label` is unique in a run. `source` is the bundle or checkpoint, as a path on the machine that runs it or as a name
    that it can open; `digest` is its fingerprint, `bytes` the size of its files, `bits_per_weight` None for the
    original. `format`: a bundle's, or "checkpoint". `unit`: what computes ("cpu", "cuda", "mps", "metal", ...: see
    `runtimes.Runtime.units`). `dtype`: of the original, "" for bundles. `threads`: None for the physical cores.
    `affinity`: the processors that the process may use, () for all. `context`: None for the model's own.
    """

    label: str
    source: str
    digest: str
    format: str
    profile: str
    bytes: int
    bits_per_weight: float | None
    runtime: str
    unit: str = "cpu"
    dtype: str = ""
    memory: Literal["fast", "lean"] = "fast"
    threads: int | None = None
    affinity: tuple[int, ...] = ()
    context: int | None = None
    allow_pickle: bool = False

    @property
    def is_original(self) -> bool:
        """Is it the checkpoint itself?"""
        return self.format == "checkpoint"

    @property
    def on_processor(self) -> bool:
        """Does the processor compute it?"""
        return self.unit in ON_PROCESSOR

    @property
    def placeless(self) -> Variant:
        """It without the place where its model lies, which `digest` tells from every other."""
        return replace(self, source="")


@dataclass(frozen=True, slots=True)
class Ask:
    """One picture and one question; an empty question asks for a caption.

    `picture`: a path on the machine that runs the job; `sha256` is the file's, `width` and `height` are in pixels.
    """

    name: str
    picture: str
    sha256: str
    width: int
    height: int
    question: str

    @property
    def placeless(self) -> Ask:
        """It without the place where its picture lies."""
        return replace(self, picture="")


@dataclass(frozen=True, slots=True)
class Work:
    """What a job does with its model.

    `warmup`: so many short answers about a grey picture of one crop before anything counts. Then every ask is answered
    greedily with exactly `tokens` tokens, a stop token does not stop it: `repeat` times, and on until `min_seconds` are
    over. `minutes`: of a sustain job.
    """

    scenario: str
    asks: tuple[Ask, ...]
    tokens: int
    warmup: int = 1
    repeat: int = 3
    min_seconds: float = 0.0
    minutes: float = 0.0


@dataclass(frozen=True, slots=True)
class Job:
    """What one fresh process does. `round`: 1, 2, ...; `device`: a device's name; `variant`: None for an anchor.

    `truth`: a file with the original's answers (`agreement.Truth`), "" where agreement is not to be measured. `cold`:
    the model's files are dropped from the page cache before they are opened. `threads`: of an anchor, None for the
    physical cores; in other jobs the variant says it.
    """

    kind: JobKind
    device: str
    work: Work
    round: int = 1
    variant: Variant | None = None
    truth: str = ""
    cold: bool = False
    threads: int | None = None

    @property
    def id(self) -> str:
        """Sixteen digits that are equal only for equal jobs: a run that was killed knows by them what is done.

        Where models, pictures and the truth lie does not matter: a folder that was moved holds the same run.
        """
        work = replace(self.work, asks=tuple(ask.placeless for ask in self.work.asks))
        variant = self.variant and self.variant.placeless
        bare = replace(self, work=work, variant=variant, truth="truth" if self.truth else "")
        text = json.dumps(encode(bare), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
