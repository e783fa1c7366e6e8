"""Checkpoint names to canonical names: a table of rules in which every tensor is accounted for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vlmedge.errors import CheckpointError
from vlmedge.session import F32
from vlmedge.spec import Shape
from vlmedge.tensors import Reshaped, RowSlice, Tensor


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of the table.

    `source` is a checkpoint name, `{i}` stands for a layer number; `targets` are the canonical names.
    Several targets split the source's rows in the proportions of their own shapes, in order. A target of
    another shape with as many elements is a reshape. A rule without targets drops the tensor and says `why`.
    """

    source: str
    targets: tuple[str, ...] = ()
    why: str = ""

    def __post_init__(self) -> None:
        """Refuse a drop without a reason."""
        if not self.targets and not self.why:
            raise ValueError(f"the rule for {self.source} drops a tensor without saying why")

    def match(self, name: str) -> str | None:
        """Return the layer number in `name` ("" where the rule has none), or None."""
        pattern = re.escape(self.source).replace(r"\{i\}", r"(\d+)").replace(r"\*", ".*")
        found = re.fullmatch(pattern, name)
        return None if found is None else (found.group(1) if found.groups() else "")


@dataclass(frozen=True, slots=True)
class WeightMap:
    """The rules of one model, with the canonical shapes that they must fill.

    `prefix` may stand before every checkpoint name or be absent (fine-tunes saved without their wrapper);
    the infix that torch.compile adds is ignored.
    """

    rules: tuple[Rule, ...]
    expected: Mapping[str, Shape]
    prefix: str = ""

    def bind(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return canonical name -> lazy tensor, in the order of the checkpoint's files.

        Raises CheckpointError for a tensor that no rule names, one of the wrong shape, or a missing one.
        """
        bound: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            rule, layer = self._rule(name)
            for target, part in self._split(name, tensor, rule, layer):
                if target in bound:
                    raise CheckpointError(f"two tensors of the checkpoint fill {target}; the second is {name}")
                bound[target] = part
        missing = [name for name in self.expected if name not in bound]
        if missing:
            raise CheckpointError(
                f"the checkpoint lacks {len(missing)} tensor(s), first {self.source_of(missing[0])!r} "
                f"(canonical {missing[0]}); is a shard missing, or is this another model?"
            )
        return bound

    def inverse(self, canonical: Mapping[str, F32]) -> dict[str, F32]:
        """Return the checkpoint's own arrays for canonical ones: `bind` undone, in the 2-D layout of `bind`'s input.

        Reshapes keep the canonical shape's elements; the caller gives the stored shape where it differs.
        """
        out: dict[str, F32] = {}
        for rule in self.rules:
            for layer in self._layers(rule):
                targets = [t.replace("{i}", layer) for t in rule.targets]
                joined = np.concatenate([canonical[t] for t in targets], axis=0)
                out[self.prefix + rule.source.replace("{i}", layer)] = joined
        return out

    def source_of(self, target: str) -> str:
        """The checkpoint name that fills a canonical name."""
        for rule in self.rules:
            for pattern in rule.targets:
                layer = Rule(pattern, (pattern,)).match(target)
                if layer is not None:
                    return self.prefix + rule.source.replace("{i}", layer)
        return target

    def _rule(self, name: str) -> tuple[Rule, str]:
        plain = name.replace("_orig_mod.", "").removeprefix(self.prefix)
        for rule in self.rules:
            layer = rule.match(plain)
            if layer is not None:
                return rule, layer
        raise CheckpointError(f"the checkpoint has the tensor {name!r}, which this model does not have")

    def _split(self, name: str, tensor: Tensor, rule: Rule, layer: str) -> list[tuple[str, Tensor]]:
        targets = [t.replace("{i}", layer) for t in rule.targets]
        unknown = [t for t in targets if t not in self.expected]
        if unknown:
            raise CheckpointError(f"the checkpoint's config has no place for the tensor {name!r} ({unknown[0]})")
        if targets and tensor.dtype not in ("f32", "f16", "bf16"):
            raise CheckpointError(f"{name!r} is stored as {tensor.dtype}; weights must be f32, f16 or bf16")
        shapes = [self.expected[t] for t in targets]
        if len(targets) == 1:
            if tensor.shape == shapes[0]:
                return [(targets[0], tensor)]
            if tensor.size == int(np.prod(shapes[0])) and _reshapable(tensor.shape, shapes[0]):
                return [(targets[0], Reshaped(tensor, shapes[0]))]
        total = sum(s[0] for s in shapes) if shapes else 0
        if len(targets) > 1 and tensor.shape == (total, *shapes[0][1:]):
            cuts = np.cumsum([0, *(s[0] for s in shapes)])
            return [(t, RowSlice(tensor, int(a), int(b))) for t, a, b in zip(targets, cuts[:-1], cuts[1:], strict=True)]
        if not targets:
            return []
        wanted = shapes[0] if len(shapes) == 1 else (total, *shapes[0][1:])
        raise CheckpointError(f"{name!r} has the shape {list(tensor.shape)}, the config asks for {list(wanted)}")

    def _layers(self, rule: Rule) -> list[str]:
        if not rule.targets:
            return []
        pattern = Rule(rule.targets[0], (rule.targets[0],))
        found = {pattern.match(name) for name in self.expected}
        return sorted((f for f in found if f is not None), key=lambda x: int(x or 0))


def _reshapable(stored: Shape, wanted: Shape) -> bool:
    """Flattening or splitting trailing axes, or a leading axis of 1, is a reshape; a swapped matrix is not."""
    squeeze = tuple(n for n in stored if n != 1), tuple(n for n in wanted if n != 1)
    return squeeze[0] == squeeze[1] or (stored[0] == wanted[0] and len(stored) != len(wanted))
