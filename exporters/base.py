"""What an exporter is given and gives back; one folder per format implements it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vlmedge.quant_profiles import Scheme
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
class ExportJob:
    """One export: the model, its lazily read tensors, a scheme for each, and an existing empty folder to write to.

    `progress(canonical name, source elements)` is called as each tensor is done. Files that the format can cut stay
    under `max_part` bytes, but for one that a single larger tensor fills.
    """

    spec: ModelSpec
    tensors: Mapping[str, Tensor]
    plan: Mapping[str, Scheme]
    tokenizer: bytes
    name: str
    out: Path
    threads: int
    progress: Progress = silent
    max_part: int = MAX_PART
    about: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Written:
    """One file of an export: its path inside the bundle, and the bundle's word for its part."""

    path: str
    role: str


class Exporter(Protocol):
    """Writes one format. Only its folder imports that format's writer."""

    format: str

    def missing(self) -> str | None:
        """Why this format cannot be written here (one line, with the remedy), or None."""

    def encodings(self, spec: ModelSpec, plan: Mapping[str, Scheme], max_part: int = MAX_PART) -> dict[str, Encoding]:
        """Canonical name -> how it would be stored; reads no weights. `max_part`: as in `ExportJob`.

        A tensor that is stored in two pieces has a second entry under `NAME#piece`.
        Raises UnsupportedError where a block has no handler or a scheme no encoding in this format.
        """

    def write(self, job: ExportJob) -> tuple[Written, ...]:
        """Write the files into `job.out`, reading each tensor once."""

    def notes(self, spec: ModelSpec, tokenizer: bytes) -> dict[str, Any]:
        """Facts for manifests: `requires` (runtime -> version), `stock` (what a stock app gets), `notes`; sentences."""
