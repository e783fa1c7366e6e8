"""Faults in the bytes of a stored matrix: scales, zero points, codes, the place where its data begin."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vlmedge.bundle import Bundle
from vlmedge.parity.faults import stored_gguf, stored_onnx
from vlmedge.parity.faults.fault import Fault, Target, Written
from vlmedge.parity.faults.places import Array, Part, Place
from vlmedge.spec import ModelSpec

# Format -> where a part of a canonical matrix lies in its files, and which parts its types have.
_PLACES: dict[str, Callable[[Place, Callable[[Array], Array]], None]] = {
    "gguf": stored_gguf.edit,
    "onnx": stored_onnx.edit,
}
_PARTS = {"gguf": stored_gguf.has, "onnx": stored_onnx.has}
_BYTES_LATE = 32  # a writer's alignment


def _matrix(spec: ModelSpec) -> str:
    """One that is not square, so that nobody can take it for its transpose."""
    return f"decoder.layers.{spec.decoder.layers // 2}.mlp.down.weight"


def _fault(name: str, what: str, part: Part, change: Callable[[Array], Array], copy: str = "") -> Fault:
    def applies(target: Target) -> bool:
        kind = target.types.get(_matrix(target.spec) + copy)
        return kind is not None and target.format in _PARTS and _PARTS[target.format](kind, part)

    def changed(bundle: Bundle) -> Bundle:
        spec, format = bundle.manifest.model, bundle.manifest.format
        matrix = _matrix(spec)
        _PLACES[format](Place(bundle.path, matrix + copy, spec.tensors()[matrix], part), change)
        return bundle

    return Fault(name, what, Written(changed), ("weights",), applies)


def _less_one(zeros: Array) -> Array:
    return np.where(zeros >= 1, zeros - 1, zeros + 1)


def _next_block(scales: Array) -> Array:
    """A block's scale is that of the block before; of the row before where a row is one block."""
    return np.roll(scales, 1, axis=1 if scales.shape[1] > 1 else 0)


def _quarter(scales: Array) -> Array:
    return scales / 4


def _quarter_kv(bundle: Bundle) -> Bundle:
    for layer in range(bundle.manifest.model.decoder.layers):
        for part in "kv":
            stored_onnx.edit_array(bundle.path, f"decoder.layers.{layer}.attn.{part}.kv_scale", _quarter)
    return bundle


def _one_row(scales: Array) -> Array:
    out = scales.copy()
    out[len(out) // 2] *= 2
    return out


STORED = (
    _fault("scales-zero", "one layer's scales are zero", "scales", np.zeros_like),
    _fault("scales-shifted", "every block has the scale of the one before", "scales", _next_block),
    _fault("scale-of-a-row", "one row's scales are twice too large", "scales", _one_row),
    _fault("zero-points", "zero points are one too small", "zeros", _less_one),
    _fault("nibbles", "low and high halves of a byte exchanged", "codes", lambda c: (c << 4) | (c >> 4)),
    _fault("data-late", "a matrix's data begin 32 bytes late", "bytes", lambda b: np.roll(b, _BYTES_LATE)),
    _fault("prefill-scales-zero", "one layer's scales are zero in the copy for prompts", "scales", np.zeros_like,
           "#prefill"),
    Fault("kv-scales", "scales of int8 keys and values are a quarter of what they must be", Written(_quarter_kv),
          ("logits", "tokens"), lambda target: target.kv_cache == "int8" and target.format == "onnx"),
)  # fmt: skip
