"""The table of model families, and how a checkpoint finds its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vlmedge.checkpoint import Checkpoint
from vlmedge.errors import UnsupportedError
from vlmedge.registry import Registry
from vlmedge.spec import ModelSpec
from vlmedge.weights import WeightMap


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A release that users can name: `vlmedge export NAME`."""

    name: str
    repo: str
    revision: str
    licence: str
    summary: str


@dataclass(frozen=True, slots=True)
class Family:
    """One line of models: how to recognise a checkpoint and describe it in the vocabulary of `spec`.

    `matches`: does this family own the config? It raises UnsupportedError for a release that it knows and
    refuses. `spec`: the checkpoint's blocks. `weights`: its table of tensor names. `tokenizer`: the bytes of
    the tokenizer.json to use, fetched where the checkpoint's own is absent or of another release.
    """

    name: str
    models: tuple[KnownModel, ...]
    matches: Callable[[Checkpoint], bool]
    spec: Callable[[Checkpoint], ModelSpec]
    weights: Callable[[ModelSpec], WeightMap]
    tokenizer: Callable[[Checkpoint], bytes]


FAMILIES: Registry[Family] = Registry(
    "family",
    {
        "moondream2": "vlmedge.families.moondream2:FAMILY",
    },
)


def family_of(checkpoint: Checkpoint) -> Family:
    """Return the family that owns the checkpoint; raises UnsupportedError where none does."""
    for family in FAMILIES.values():
        if family.matches(checkpoint):
            return family
    kind = checkpoint.config.get("model_type") or checkpoint.config.get("architectures")
    raise UnsupportedError(
        f"{checkpoint.source.label} is a '{kind}' checkpoint; this version knows the families "
        f"{', '.join(FAMILIES)} (vlmedge models lists their releases)"
    )


def known_models() -> dict[str, KnownModel]:
    """Every release that has a short name."""
    return {model.name: model for family in FAMILIES.values() for model in family.models}
