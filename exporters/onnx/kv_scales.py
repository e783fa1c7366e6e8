"""Scales of int8 keys and values from the weights alone, so that no picture is needed to export.

A normalised row has a mean square of one, so a key is about its mean (the norm's bias through the projection) plus a
spread (the length of the projection's row after the norm's weight) times a number of unit variance. A layer norm also
takes the mean away, so there a row's own mean adds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from vlmedge.exporters.onnx.store import KvScale
from vlmedge.session import F32
from vlmedge.spec import DecoderSpec
from vlmedge.tensors import Tensor

REACH = 8.0  # spreads that int8 covers; what lies beyond is clipped
_CODES = 127.0
_LEAST = 1e-8


@dataclass(slots=True)
class Observer:
    """Collects one projection's rows, in any order and from several threads, each row once."""

    gain: F32
    centred: bool
    shift: F32 | None
    bias: F32 | None
    mean: F32 = field(init=False)
    spread: F32 = field(init=False)

    def expect(self, rows: int) -> None:
        """Make room for `rows` rows."""
        self.mean, self.spread = np.zeros(rows, np.float32), np.zeros(rows, np.float32)

    def see(self, start: int, rows: F32) -> None:
        """Take rows float32 [n, width] of the projection's matrix, the first being number `start`."""
        part = slice(start, start + len(rows))
        scaled = rows * self.gain
        if self.centred:
            scaled -= scaled.mean(axis=1, keepdims=True)
        self.spread[part] = np.linalg.norm(scaled, axis=1)
        if self.shift is not None:
            self.mean[part] = rows @ self.shift
        if self.bias is not None:
            self.mean[part] += self.bias[part]


def observers(spec: DecoderSpec, tensors: Mapping[str, Tensor], scales: tuple[KvScale, ...]) -> dict[str, Observer]:
    """Projection matrix -> its observer, for every layer and part that has scales."""
    out = {}
    for scale in scales:
        layer = f"decoder.layers.{scale.layer}"
        name = f"{layer}.attn.{scale.part}"
        gain, shift, bias = (
            tensors[key].read() if key in tensors else None
            for key in (f"{layer}.norm1.weight", f"{layer}.norm1.bias", f"{name}.bias")
        )
        assert gain is not None
        out[f"{name}.weight"] = Observer(gain, spec.norm == "layer", shift, bias)
        out[f"{name}.weight"].expect(spec.kv_heads * spec.head_dim)
    return out


def scales_of(spec: DecoderSpec, part: str, seen: Observer) -> F32:
    """Scales float32 [1, kv_heads, 1, head_dim]; keys are rounded after they were rotated."""
    mean, spread = (np.abs(x).reshape(spec.kv_heads, spec.head_dim) for x in (seen.mean, seen.spread))
    if part == "k":
        half, whole = spec.rope_dims // 2, spec.rope_dims
        a, b = slice(0, half), slice(half, whole)
        mean[:, a] = mean[:, b] = np.hypot(mean[:, a], mean[:, b])
        spread[:, a] = spread[:, b] = np.maximum(spread[:, a], spread[:, b])
    reach = np.maximum(mean + np.float32(REACH) * spread, np.float32(_LEAST))
    scales: F32 = np.divide(reach, np.float32(_CODES)).reshape(1, spec.kv_heads, 1, spec.head_dim)
    return scales
