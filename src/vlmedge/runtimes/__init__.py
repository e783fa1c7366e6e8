"""The table of runtimes: what runs which format, whether it can run here, and how it is opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlmedge.quant_profiles import KvCache
from vlmedge.registry import Registry
from vlmedge.session import Session
from vlmedge.spec import ModelSpec
from vlmedge.tensors import Tensor

Memory = Literal["fast", "lean"]


@dataclass(frozen=True, slots=True)
class Opening:
    """What a runtime is given: a bundle's folder, or a checkpoint's tensors, with the model's spec.

    `memory`: "fast" holds one copy of the weights in the layout that computes fastest; "lean" maps the
    file, so that the system can drop pages. `dtype` is the original's ("f32", "bf16", "f16"). `kv_cache` is the
    type of the stored keys and values, where the runtime has a choice; it and `flavour` are the manifest's. `cache`:
    a folder, perhaps not there yet, for files that make the next opening cheaper; None: write nothing anywhere.
    `provider`: the unit that computes, one of `Runtime.units`; None: the CPU.
    """

    spec: ModelSpec
    folder: Path | None = None
    tensors: Mapping[str, Tensor] | None = None
    threads: int | None = None
    memory: Memory = "fast"
    dtype: str = "f32"
    kv_cache: KvCache = "f16"
    flavour: str = ""
    cache: Path | None = None
    provider: str | None = None


@dataclass(frozen=True, slots=True)
class Runtime:
    """One way to run a model.

    `loads`: the bundle format, or "checkpoint" for the original. `missing`: None where it can run here, else
    one line that says what to do. `units`: what can compute ("cpu", "cuda", "metal", ...): "" where it can be used
    here, else one line why not and what to do; a package that is not installed is never imported for it. `open` opens
    on exactly the unit that is asked for, or raises UsageError for a name that is none of them, RuntimeFailedError for
    one that cannot be used here. `libraries`: the modules whose import is the long part of the first opening.
    """

    name: str
    loads: str
    missing: Callable[[], str | None]
    open: Callable[[Opening], Session]
    units: Callable[[], Mapping[str, str]]
    libraries: tuple[str, ...] = ()


RUNTIMES: Registry[Runtime] = Registry(
    "runtime",
    {
        "llamacpp": "vlmedge.runtimes.llamacpp:RUNTIME",
        "onnxruntime": "vlmedge.runtimes.onnxruntime:RUNTIME",
        "torch": "vlmedge.reference.runtime:RUNTIME",
    },
)
