"""The original with one layer in memory at a time: a 2B model is verified in a few hundred megabytes.

Every call reads the component's weights once, whatever the number of inputs, so callers give all inputs together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from vlmedge import imaging
from vlmedge.reference.blocks import DecoderLayer, Region, Tower, VisionLayer, norm, projector, rope_table
from vlmedge.reference.model import fill
from vlmedge.reference.session import run_head
from vlmedge.reference.threads import computing
from vlmedge.session import F32, I32, Grid
from vlmedge.spec import ModelSpec
from vlmedge.tensors import Tensor

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Passage:
    """Embeddings float32 [t, width]; the first `prefix` positions all see each other; `wanted` ones get logits."""

    embeddings: F32
    prefix: int
    wanted: tuple[int, ...]


class StreamedReference:
    """The blocks of `reference`, float32, with weights read when a layer's turn comes and dropped after it."""

    def __init__(self, spec: ModelSpec, tensors: Mapping[str, Tensor], threads: int | None = None) -> None:
        self.threads = threads
        self._spec, self._tensors = spec, tensors

    @computing
    def vision(self, pixels: F32) -> F32:
        """Normalised pixels float32 [n, 3, size, size] -> features float32 [n, tokens, width]."""
        spec = self._spec.vision
        shell = self._filled(Tower(replace(spec, layers=0)), "vision.")
        x = shell.patches(torch.from_numpy(pixels))
        layer = VisionLayer(spec)
        for i in range(spec.layers):
            x = self._filled(layer, f"vision.layers.{i}.")(x)
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
                rows = np.concatenate([rows, imaging.pool_local(features[1:], spec.image, tiling)], axis=-1)
            out.append(_array(module(torch.from_numpy(rows))))
        return out

    def embed(self, ids: I32) -> F32:
        """int32 [n] -> float32 [n, width]; only these rows are read."""
        table = self._tensors["decoder.embed.weight"]
        return np.concatenate([table.read_rows(int(i), int(i) + 1) for i in ids])

    @computing
    def logits(self, passages: Sequence[Passage]) -> list[F32]:
        """Run every passage through the decoder; float32 [wanted, vocab] each."""
        spec = self._spec.decoder
        rope, layer = rope_table(spec), DecoderLayer(spec)
        states = [torch.from_numpy(p.embeddings)[None] for p in passages]
        masks = [_mask(len(p.embeddings), p.prefix) for p in passages]
        for i in range(spec.layers):
            self._filled(layer, f"decoder.layers.{i}.")
            states = [layer(x, rope[:, : x.shape[1]], None, mask, False) for x, mask in zip(states, masks, strict=True)]
        last = self._filled(norm(spec), "decoder.norm.")
        picked = [last(x[0, list(p.wanted)]) for x, p in zip(states, passages, strict=True)]
        return [self._head(h) for h in picked]

    @computing
    def region(self, inputs: Mapping[str, F32]) -> dict[str, F32]:
        """Region heads by their names in `Session.head`: one vector float32 into each, one out of it."""
        spec = self._spec.region
        assert spec is not None
        heads = self._filled(Region(spec, self._spec.decoder.width), "region.")
        return {name: _array(run_head(heads, name, torch.from_numpy(x))) for name, x in inputs.items()}

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
        return module


def _mask(length: int, prefix: int) -> torch.Tensor:
    """True where a query (row) sees a key: everything before, and the whole prefix from within it."""
    mask = torch.ones(length, length, dtype=torch.bool).tril_()
    mask[:prefix, :prefix] = True
    return mask


def _array(tensor: torch.Tensor) -> F32:
    result: F32 = tensor.numpy()
    return result
