"""The original with one layer in memory at a time: a 2B model is verified in a few hundred megabytes.

Every call reads the component's weights once, whatever the number of inputs, so callers give all inputs together.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from vlmedge.reference.blocks import DecoderLayer, LayerCache, Region, Tower, VisionLayer, norm, projector, rope_table
from vlmedge.reference.model import fill, sources
from vlmedge.reference.preprocess import joined
from vlmedge.reference.session import run_head
from vlmedge.reference.threads import computing
from vlmedge.session import F32, I32, Grid
from vlmedge.spec import ModelSpec
from vlmedge.tensors import Tensor

M = TypeVar("M", bound=nn.Module)
I64: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]
_CROPS_AT_ONCE = 8  # bounds what a layer holds beside its input


@dataclass(frozen=True, slots=True)
class Passage:
    """One conversation with all its branches, as a tree of positions.

    `embeddings` float32 [t, width]; `positions` int64 [t]: where each stands; `mask` bool [t, t]: true where a row
    sees a column; `wanted`: rows whose logits are asked for; `prefill` bool [t]: rows that a second copy of the
    weights computes, where there is one.
    """

    embeddings: F32
    positions: I64
    mask: Bools
    wanted: tuple[int, ...]
    prefill: Bools


@dataclass(frozen=True, slots=True)
class Decoded:
    """For the wanted rows: logits float32 [wanted, vocab], and hidden states before the final norm [wanted, width]."""

    logits: F32
    hidden: F32


class StreamedReference:
    """The blocks of `reference`, float32, with weights read when a layer's turn comes and dropped after it."""

    def __init__(
        self,
        spec: ModelSpec,
        tensors: Mapping[str, Tensor],
        threads: int | None = None,
        halves: Collection[str] = frozenset(),
    ) -> None:
        """`halves`: canonical weights whose inputs are rounded to f16 before they are multiplied."""
        self.threads = threads
        self._halves = halves
        self._spec, self._tensors = spec, tensors
        copies = {name.removesuffix("#prefill"): t for name, t in tensors.items() if name.endswith("#prefill")}
        self._second = {**tensors, **copies} if copies else {}

    @computing
    def vision(self, pixels: F32) -> F32:
        """Normalised pixels float32 [n, 3, size, size] -> features float32 [n, tokens, width]."""
        spec = self._spec.vision
        shell = self._filled(Tower(replace(spec, layers=0)), "vision.")
        x = shell.patches(torch.from_numpy(pixels))
        layer = VisionLayer(spec)
        for i in range(spec.layers):
            self._filled(layer, f"vision.layers.{i}.")
            x = torch.cat([layer(part) for part in torch.split(x, _CROPS_AT_ONCE)])
        return _array(shell.normed(x))

    @computing
    def project(self, pictures: Sequence[tuple[F32, Grid]]) -> list[F32]:
        """Features float32 [crops, tokens, width] and tiling of each picture -> embeddings [image_tokens, width]."""
        spec = self._spec
        module = self._filled(projector(spec.projector, spec.vision, spec.decoder.width), "projector.")
        out = []
        for features, tiling in pictures:
            rows = features[0]
            if spec.projector.joins_global:
                rows = np.concatenate([rows, joined(features[1:], spec.image, tiling)], axis=-1)
            out.append(_array(module(torch.from_numpy(rows))))
        return out

    def embed(self, ids: I32) -> F32:
        """int32 [n] -> float32 [n, width]; only these rows are read."""
        table = self._tensors["decoder.embed.weight"]
        return np.concatenate([table.read_rows(int(i), int(i) + 1) for i in ids])

    @computing
    def decode(self, passages: Sequence[Passage]) -> list[Decoded]:
        """Run every passage through the decoder."""
        spec = self._spec.decoder
        ropes = [rope_table(spec)[:, torch.from_numpy(p.positions)] for p in passages]
        states = [torch.from_numpy(p.embeddings)[None] for p in passages]
        layer, other = DecoderLayer(spec), DecoderLayer(spec) if self._second else None
        for i in range(spec.layers):
            self._filled(layer, f"decoder.layers.{i}.")
            if other is not None:
                fill(other, self._second, f"decoder.layers.{i}.")
            states = [_through(layer, other, *given) for given in zip(states, ropes, passages, strict=True)]
        last = self._filled(norm(spec), "decoder.norm.")
        hidden = [x[0, list(p.wanted)] for x, p in zip(states, passages, strict=True)]
        return [Decoded(self._head(last(h)), _array(h)) for h in hidden]

    @computing
    def region(self, calls: Sequence[tuple[str, F32]]) -> list[F32]:
        """Region heads by their names in `Session.head`: one vector float32 into each, one out of it."""
        spec = self._spec.region
        assert spec is not None
        heads = self._filled(Region(spec, self._spec.decoder.width), "region.")
        return [_array(run_head(heads, name, torch.from_numpy(x))) for name, x in calls]

    def _head(self, hidden: torch.Tensor) -> F32:
        """Logits by blocks of the vocabulary, so that the head is never whole in float32."""
        tied = self._spec.decoder.tied_head
        table = self._tensors["decoder.embed.weight" if tied else "decoder.head.weight"]
        out = torch.cat([hidden @ torch.from_numpy(block).T for block in table.blocks()], dim=-1)
        if not tied and self._spec.decoder.head_bias:
            out += torch.from_numpy(self._tensors["decoder.head.bias"].read())
        return _array(out)

    def _filled(self, module: M, prefix: str) -> M:
        fill(module, self._tensors, prefix)
        for name, part in module.named_modules() if self._halves else ():
            if isinstance(part, nn.Linear | nn.Conv2d):
                part._forward_pre_hooks.clear()
                if sources(f"{prefix}{name}.weight")[0] in self._halves:
                    part.register_forward_pre_hook(_rounded)
        return module


def _through(
    layer: DecoderLayer, other: DecoderLayer | None, x: torch.Tensor, rope: torch.Tensor, passage: Passage
) -> torch.Tensor:
    """One passage through one layer, or by turns through its two copies over shared keys and values."""
    mask = torch.from_numpy(passage.mask)
    if other is None:
        return cast(torch.Tensor, layer(x, rope, None, mask, False))
    spec = replace(layer.attn.spec, context=x.shape[1])
    cache = LayerCache(spec, x.dtype, x.device)
    cuts = [0, *(np.flatnonzero(np.diff(passage.prefill)) + 1).tolist(), x.shape[1]]
    out = []
    for start, stop in pairwise(cuts):
        chosen = other if passage.prefill[start] else layer
        out.append(chosen(x[:, start:stop], rope[:, start:stop], cache, mask[start:stop, :stop], False))
    return torch.cat(out, dim=1)


def _rounded(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(x.half().float() for x in inputs)


def _array(tensor: torch.Tensor) -> F32:
    result: F32 = tensor.numpy()
    return result
