"""What an exporter is given and gives back; one folder per format implements it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vlmedge.quant_profiles import KvCache, Scheme
from vlmedge.spec import ModelSpec, Shape
from vlmedge.tensors import Tensor

Progress = Callable[[str, int], None]


# Bytes of one file: an app store's asset pack holds 1.5 GB, and 2 GiB is what 32-bit offsets reach.
MAX_PART = 1_400_000_000


def silent(name: str, count: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """How one canonical tensor is stored: file, the format's own type name, bytes, and why it differs from the plan.

    `tensor` is the name inside `file`; `shape` the stored shape (padding included).
    """

    file: str
    tensor: str
    type: str
    shape: Shape
    bytes: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be written, as far as it is known before a weight is read.

    `plan`: a scheme for every canonical tensor. `prefill`: schemes for those of the decoder's matrices that have a
    second copy for calls of many positions; empty: one copy for all. `flavour`: one of `Exporter.flavours`, "" for
    the first. `kv_cache`: the type that the files are written for, as `Exporter.kv_cache` says. Files that the
    format can cut stay under `max_part` bytes, but for one that a single larger tensor fills.
    """

    spec: ModelSpec
    plan: Mapping[str, Scheme]
    prefill: Mapping[str, Scheme] = field(default_factory=dict)
    flavour: str = ""
    kv_cache: KvCache = "f16"
    max_part: int = MAX_PART


@dataclass(frozen=True, slots=True)
class ExportJob:
    """One export: what is ordered, the lazily read tensors, and an existing empty folder to write to.

    `progress(canonical name, source elements)` is called as each tensor is done.
    """

    order: Order
    tensors: Mapping[str, Tensor]
    tokenizer: bytes
    name: str
    out: Path
    threads: int
    progress: Progress = silent
    about: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Written:
    """One file of an export: its path inside the bundle, and the bundle's word for its part."""

    path: str
    role: str


@dataclass(frozen=True, slots=True)
class Grain:
    """How finely a stored matrix follows what it was made of: `bits` per value, 16 and 32 being floats.

    `group`: neighbours of a row that share one scale (0: the whole row does). `whole`: neighbours whose groups' scales
    (and minima) are rounded to integers that share one scale (0: none are); a group can then be off by `share` of the
    largest step in its `whole`. `mantissa`: stored digits of a float's fraction where they are not IEEE's of its width
    (0: they are). `pieces`: 2 where a row is [global | local] and stored as the arrays global + local and local.
    """

    bits: int
    group: int = 0
    pieces: int = 1
    whole: int = 0
    share: float = 0.0
    mantissa: int = 0


@dataclass(frozen=True, slots=True)
class Readback:
    """What an export's files hold, in canonical words: verification compares it with the checkpoint.

    `tensors`: every canonical tensor, dequantized as it is read (`NAME#prefill` for a second copy); `grains` of the
    same names, and `bytes` that each takes, scales and padding included. `facts`: dotted path into the ModelSpec
    ("decoder.norm_eps") -> the value that the files state; a format whose files state nothing has none.
    `halves`: weights that the format's runtime multiplies with inputs which it rounds to f16.
    """

    tensors: Mapping[str, Tensor]
    grains: Mapping[str, Grain]
    bytes: Mapping[str, int]
    facts: Mapping[str, Any]
    halves: frozenset[str] = frozenset()


class Exporter(Protocol):
    """Writes one format. Only its folder imports that format's writer.

    `flavours`: the ways in which it can write its files, the default first; ("",) where there is one way.
    `default_profile`: the profile that is meant where none is named.
    """

    format: str
    flavours: tuple[str, ...]
    default_profile: str

    def missing(self) -> str | None:
        """Why this format cannot be written here (one line, with the remedy), or None."""

    def kv_cache(self, wanted: KvCache, flavour: str) -> KvCache:
        """The type in which this format's runtime really keeps keys and values where a profile wants `wanted`."""

    def encodings(self, order: Order) -> dict[str, Encoding]:
        """Canonical name -> how it would be stored; reads no weights.

        A tensor that is stored in two pieces has a second entry under `NAME#piece`, the copy for prefill one under
        `NAME#prefill`.
        Raises UnsupportedError where a block has no handler or a scheme no encoding in this format.
        """

    def write(self, job: ExportJob) -> tuple[Written, ...]:
        """Write the files into `job.out`, reading each tensor once.

        Raises OSError where writing fails: whoever made the folder knows the name that a user gave it.
        """

    def read(self, spec: ModelSpec, folder: Path) -> Readback:
        """Open what `write` wrote, by the files' own words; values are read when they are asked for.

        Raises BundleError where a tensor is missing, of another shape or of an unknown type.
        """

    def tokenizer_facts(self, spec: ModelSpec, tokenizer: bytes) -> dict[str, Any]:
        """The facts of `Readback` under `tokenizer.`, as they are where the files hold this tokenizer.json's words."""

    def notes(self, order: Order, tokenizer: bytes) -> dict[str, Any]:
        """Facts for manifests: `requires` (runtime -> version), `stock` (what a stock app gets), `notes`; sentences."""
