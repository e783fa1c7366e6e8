"""Where GGUF files keep the scales, minimums and codes of a matrix: inside its blocks (ggml/src/ggml-common.h)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from vlmedge.exporters.gguf.ggml import TYPES
from vlmedge.exporters.gguf.layout import NAMES
from vlmedge.parity.faults.places import FLOATS, Array, Part, Place, mapped
from vlmedge.runtimes.ggml_file import GgufFile, StoredTensor

# Type -> first byte of a block's f16 scale; K-quants: of the scale that its blocks' own share.
_SCALE = {
    "Q4_0": 0, "Q4_1": 0, "Q5_0": 0, "Q5_1": 0, "Q8_0": 0, "IQ4_NL": 0, "IQ4_XS": 0,
    "Q2_K": 80, "Q3_K": 108, "Q4_K": 0, "Q5_K": 0, "Q6_K": 208,
}  # fmt: skip
# Types whose blocks hold their least value as a second f16, at this byte: value = scale * code + minimum.
_MINIMUM = {"Q4_1": 2, "Q5_1": 2}
# Bytes of a block that hold two codes each.
_CODES = {
    "Q4_0": (2, 18), "Q4_1": (4, 20), "Q5_0": (6, 22), "Q5_1": (8, 24), "IQ4_NL": (2, 18), "Q4_K": (16, 144),
    "Q5_K": (48, 176),
}  # fmt: skip


def has(kind: str, part: Part) -> bool:
    """Does a matrix of this type have such a part?"""
    tables: dict[Part, object] = {"scales": _SCALE, "zeros": _MINIMUM, "codes": _CODES}
    known = tables.get(part)
    return kind in FLOATS or kind in _SCALE if known is None else isinstance(known, dict) and kind in known


def edit(place: Place, change: Callable[[Array], Array]) -> None:
    """Change a part of a matrix where it lies."""
    path, stored = _find(place)
    raw = mapped(path, stored.offset, stored.bytes)
    if place.part == "bytes":
        raw[:] = change(np.array(raw))
        return
    kind = next(t for t in TYPES.values() if t.number == stored.type)
    blocks = raw.reshape(stored.shape[1], -1, kind.bytes)
    if place.part == "codes":
        start, stop = _CODES[kind.name]
        blocks[..., start:stop] = change(np.array(blocks[..., start:stop]))
        return
    scales = _halves(blocks, _SCALE[kind.name])
    if place.part == "scales":
        _store(blocks, _SCALE[kind.name], change(scales))
        return
    minimums = _halves(blocks, _MINIMUM[kind.name])
    zeros = -minimums / np.where(scales == 0, 1, scales)
    _store(blocks, _MINIMUM[kind.name], -change(zeros) * scales)


def _find(place: Place) -> tuple[Path, StoredTensor]:
    for path in sorted(place.folder.glob("*.gguf")):
        file = GgufFile(path)
        if (stored := file.tensors.get(_name(place.name))) is not None:
            return path, stored
    raise LookupError(f"no GGUF file in {place.folder} holds {place.name}")


def _name(canonical: str) -> str:
    """layout.NAMES with the layer's number filled in."""
    stem, _, leaf = canonical.rpartition(".")
    parts = stem.split(".")
    pattern = ".".join("{i}" if part.isdigit() else part for part in parts)
    number = next((part for part in parts if part.isdigit()), "")
    return f"{NAMES[pattern].replace('{i}', number)}.{leaf}"


def _halves(blocks: Array, at: int) -> Array:
    """The f16 at one byte of every block: float32 [rows, blocks]."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16)[..., 0].astype(np.float32)


def _store(blocks: Array, at: int, values: Array) -> None:
    blocks[..., at : at + 2] = np.ascontiguousarray(values.astype(np.float16))[..., None].view(np.uint8)
