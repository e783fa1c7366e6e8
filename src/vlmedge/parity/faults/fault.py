"""What a fault is: a name, the place where it is planted, and the stages at which a gate may first show it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeAlias

from vlmedge.bundle import Bundle
from vlmedge.exporters import ExportJob
from vlmedge.session import Session
from vlmedge.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Target:
    """An export that a fault may be planted in, by the facts that decide whether it can be.

    `types`: canonical name -> the format's own word for how it is stored, the entries of `Exporter.encodings`.
    """

    spec: ModelSpec
    format: str
    flavour: str
    profile: str
    kv_cache: str
    types: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Given:
    """Planted in what the exporter is given; the manifest knows nothing of it."""

    change: Callable[[ExportJob], ExportJob]


@dataclass(frozen=True, slots=True)
class Written:
    """Planted in a bundle's files afterwards. `rehash`: the manifest's hashes are made right again."""

    change: Callable[[Bundle], Bundle]
    rehash: bool = True


@dataclass(frozen=True, slots=True)
class Running:
    """Planted between the runtime and everything above it."""

    wrap: Callable[[Session, Bundle], Session]


@dataclass(frozen=True, slots=True)
class Shared:
    """Planted in code that every runtime uses, for the length of a block."""

    patch: Callable[[ModelSpec], AbstractContextManager[object]]


Plant: TypeAlias = Given | Written | Running | Shared


def everywhere(_: Target) -> bool:
    """Any export can have it."""
    return True


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. `what`: one line. `stages`: where the gate may first show it, REFUSED among them.

    `applies`: can this export have it, by declared facts? One that changes no byte of the files is none either.
    """

    name: str
    what: str
    plant: Plant
    stages: tuple[str, ...]
    applies: Callable[[Target], bool] = everywhere
