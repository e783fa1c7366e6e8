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
    `provider`: the execution provider that is wanted; None: the runtime chooses.
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
    one line that says what to do. `has_providers`: `Opening.provider` means something to it.
    """

    name: str
    loads: str
    missing: Callable[[], str | None]
    open: Callable[[Opening], Session]
    has_providers: bool = False


RUNTIMES: Registry[Runtime] = Registry(
    "runtime",
    {
        "llamacpp": "vlmedge.runtimes.llamacpp:RUNTIME",
        "onnxruntime": "vlmedge.runtimes.onnxruntime:RUNTIME",
        "torch": "vlmedge.reference.runtime:RUNTIME",
    },
)
