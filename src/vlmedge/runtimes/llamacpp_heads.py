"""The parts of a model that stock llama.cpp has no place for: the joined projector and the region heads.

The names and meanings of the tensors are stated in exporters/gguf/heads.py, which writes them.
"""

from __future__ import annotations

import math

import numpy as np

from vlmedge import imaging
from vlmedge.errors import UnsupportedError
from vlmedge.runtimes.ggml_file import GgufFile
from vlmedge.runtimes.ggml_matmul import GgmlMatmuls
from vlmedge.session import F32, Grid
from vlmedge.spec import Activation, ModelSpec

_GELU_ROWS = 16  # rows at once: temporaries that stay in the cache


class Projector:
    """Two linear layers from tower features to decoder embeddings: `mm.0` and `mm.2` of mmproj.gguf.

    Where the projector joins global and local features, mm.0 is the fold F = W_global + W_local, and
    W [g | l] + b = F g + W_local (l - g) + b; for a single crop l is g, and the second product is not needed.
    """

    def __init__(self, matmuls: GgmlMatmuls, mmproj: GgufFile, heads: GgufFile | None, spec: ModelSpec) -> None:
        _check_activation(spec.projector.activation)
        self._matmuls, self._mmproj, self._heads, self._spec = matmuls, mmproj, heads, spec

    def run(self, features: F32, tiling: Grid) -> F32:
        """float32 [crops, tokens, width] -> float32 [image_tokens, decoder width]."""
        hidden = self._matmuls.linear(self._mmproj, "mm.0", features[0])
        if self._spec.projector.joins_global and tiling != (1, 1) and self._heads is not None:
            local = imaging.pool_local(features[1:], self._spec.image, tiling)
            hidden += self._matmuls.product(self._heads, "projector.local.weight", local - features[0])
        return self._matmuls.linear(self._mmproj, "mm.2", gelu_tanh(hidden))


class RegionHeads:
    """Coordinates and sizes to embeddings, and hidden states to bins; `region.*` of heads.gguf."""

    def __init__(self, matmuls: GgmlMatmuls, heads: GgufFile, activation: Activation) -> None:
        _check_activation(activation)
        self._matmuls, self._heads = matmuls, heads
        self._frequencies = {kind: matmuls.vector(heads, f"region.{kind}_features") for kind in ("coord", "size")}

    def run(self, name: str, vector: F32) -> F32:
        """Run one head on one vector; see `Session.head`."""
        kind, _, direction = name.partition("_")
        if kind not in self._frequencies or direction not in ("encoder", "decoder"):
            raise ValueError(f"there is no region head {name}")
        x = np.atleast_1d(np.asarray(vector, np.float32))[None]
        if direction == "encoder":
            out = self._linear(name, fourier(x, self._frequencies[kind]))
        else:
            out = self._linear(f"{name}.down", gelu_tanh(self._linear(f"{name}.up", x)))
        return out.reshape(-1)

    def _linear(self, name: str, x: F32) -> F32:
        return self._matmuls.linear(self._heads, f"region.{name}", x)


def fourier(x: F32, frequencies: F32) -> F32:
    """Return cos and sin of 2 pi x @ frequencies, joined: [n, axes] and [axes, k] -> float32 [n, 2k]."""
    angles: F32 = np.matmul(np.multiply(np.float32(2 * math.pi), x), frequencies)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)


def gelu_tanh(x: F32) -> F32:
    """The tanh form of GELU in float32, in place; ggml's own reads a table of half-precision values."""
    for start in range(0, len(x), _GELU_ROWS):
        rows = x[start : start + _GELU_ROWS]
        inner = rows * rows
        inner *= np.float32(0.044715)
        inner += np.float32(1.0)
        inner *= rows
        inner *= np.float32(math.sqrt(2 / math.pi))
        np.tanh(inner, out=inner)
        inner += np.float32(1.0)
        inner *= np.float32(0.5)
        rows *= inner
    return x


def _check_activation(activation: Activation) -> None:
    if activation != "gelu_tanh":
        raise UnsupportedError(f"the GGUF runtime has no {activation} between a projector's layers, only gelu_tanh")
