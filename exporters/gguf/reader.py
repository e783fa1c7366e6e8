"""A GGUF export read back: every canonical tensor out of the files' own names, shapes and types."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vlmedge.errors import BundleError
from vlmedge.exporters.base import Grain, Readback
from vlmedge.exporters.gguf.dequantizer import GRAINS, NO_ZERO, decode, type_of
from vlmedge.exporters.gguf.facts import read_facts
from vlmedge.exporters.gguf.layout import HEADS, LOCAL, MMPROJ, NAMES, TEXT
from vlmedge.runtimes.ggml_file import GgufFile, StoredTensor
from vlmedge.session import F32
from vlmedge.spec import ModelSpec, Shape, component
from vlmedge.tensors import Tensor

JOINED = "projector.up.weight"
_CANONICAL = {stored: canonical for canonical, stored in NAMES.items()}
_FILE_OF = {"decoder": TEXT, "region": HEADS, "vision": MMPROJ, "projector": MMPROJ}
# Zeros may follow at the end of one axis: layout.py pads the vision MLP.
_PADDED_AXIS = {"mlp.up.weight": 0, "mlp.up.bias": 0, "mlp.down.weight": 1}


def read_back(spec: ModelSpec, folder: Path) -> Readback:
    """Open the files of `folder` and find every tensor of `spec` in them; values are read when they are asked for.

    A joined projector's first layer is [fold - local | local]. Raises BundleError for a file that is missing, cut or
    damaged, a tensor that is missing, of another shape or of an unknown type, and one that the model does not have.
    """
    text, mmproj = _text_parts(folder), GgufFile(folder / MMPROJ)
    parts = {TEXT: text, MMPROJ: [mmproj]}
    if spec.region is not None or spec.projector.joins_global:
        parts[HEADS] = [GgufFile(folder / HEADS)]
    places = {name: place for file, opened in parts.items() for name, place in _places(file, opened, spec)}
    stored = {}
    for name, (file, shape) in _expected(spec).items():
        if name not in places:
            raise BundleError(f"{folder / file} has no tensor for {name}; export it again")
        stored[name] = PaddedTensor(*places[name], name, shape)
    tensors: dict[str, Tensor] = {name: stored[name] for name in spec.tensors()}
    sizes = {name: stored[name].bytes for name in tensors}
    grains = {name: GRAINS[stored[name].kind.name] for name in tensors}
    if LOCAL in stored:
        tensors[JOINED] = UnfoldedTensor(stored[JOINED], stored[LOCAL])
        sizes[JOINED] += stored[LOCAL].bytes
        grains[JOINED] = _coarser(grains[JOINED], GRAINS[stored[LOCAL].kind.name])
    # ggml's product with f16 takes f16 (vec_dot_type of GGML_TYPE_F16, ggml/src/ggml-cpu/ggml-cpu.c).
    halves = frozenset(name for name in tensors if stored[name].kind.name == "F16")
    return Readback(tensors, grains, sizes, read_facts(text[0], mmproj), halves)


class PaddedTensor(Tensor):
    """A canonical tensor inside a stored one, dequantized as it is read; what lies beyond its shape must be zero.

    `dtype` is ggml's name of the type in lower case ("f16", "q4_k").
    """

    def __init__(self, file: GgufFile, stored: StoredTensor, name: str, shape: Shape) -> None:
        """Check type and shape; raises BundleError where they cannot be those of the canonical tensor `name`."""
        self._where = f"{file.path}: tensor {stored.name}"
        self.kind = type_of(stored.type, self._where)
        self.shape, self.dtype = shape, self.kind.name.lower()
        outer: Shape = tuple(reversed(stored.shape))  # ggml names the length of a row first
        if not _covers(outer, shape, _padded_axis(name)):
            raise BundleError(f"{self._where} is {list(outer)}, not {list(shape)} as {name}; export it again")
        self._stored_rows = outer[0] if len(outer) > 1 else 1
        self._stored_columns = self.columns if len(outer) > 2 else outer[-1]
        self._data = file.data[stored.offset : stored.offset + stored.bytes]

    @property
    def bytes(self) -> int:
        """Bytes in the file, padding included."""
        return int(self._data.nbytes)

    def read_rows(self, start: int, stop: int) -> F32:
        """Rows start..stop as float32; raises BundleError where padding behind them is not zero."""
        row = self._stored_columns // self.kind.block * self.kind.bytes
        last = self._stored_rows if stop == self.rows else stop  # padded rows are checked with the last one
        values = decode(self._data[start * row : last * row], self.kind, self._stored_columns)
        inside = values[: stop - start, : self.columns]
        if values.size > inside.size:
            self._check_padding(values[stop - start :], values[: stop - start, self.columns :], inside)
        return np.ascontiguousarray(inside)

    def _check_padding(self, below: F32, beside: F32, inside: F32) -> None:
        # Beside other values a type without a zero comes within a step of it; the tower is indifferent: padding of
        # `down` meets GELU(0) = 0.
        step = 2.0 ** (1 - GRAINS[self.kind.name].bits) if self.kind.name in NO_ZERO else 0.0
        near = step * np.abs(inside).max(axis=1, keepdims=True, initial=0.0)
        if below.any() or not (np.abs(beside) <= near).all():
            raise BundleError(f"{self._where} is not zero beyond {list(self.shape)}, its padding; export it again")


class UnfoldedTensor(Tensor):
    """The joined projector's first layer [global | local], out of the fold global + local and the local half."""

    def __init__(self, fold: Tensor, local: Tensor) -> None:
        """Both are [hidden, vision width]."""
        self._fold, self._local = fold, local
        self.shape = (fold.shape[0], 2 * fold.shape[1])
        self.dtype = fold.dtype

    def read_rows(self, start: int, stop: int) -> F32:
        """Rows start..stop as float32."""
        local = self._local.read_rows(start, stop)
        return np.concatenate([self._fold.read_rows(start, stop) - local, local], axis=1)


def _text_parts(folder: Path) -> list[GgufFile]:
    """text.gguf, or all of its parts in their order (`LLM_KV_SPLIT_*`, src/llama-model-loader.cpp)."""
    paths = sorted(folder.glob("text*.gguf")) or [folder / TEXT]
    parts = [GgufFile(path) for path in paths]
    numbers = [part.metadata.get("split.no", 0) for part in parts]
    if parts[0].metadata.get("split.count", 1) != len(parts) or numbers != list(range(len(parts))):
        raise BundleError(
            f"{folder} lacks a part of {TEXT} or has one too many: {paths[0].name} says how many there are"
        )
    return parts


def _expected(spec: ModelSpec) -> dict[str, tuple[str, Shape]]:
    """Canonical name (and LOCAL) -> the file that it belongs into and its shape there but for padding."""
    shapes = {name: (_FILE_OF[component(name)], shape) for name, shape in spec.tensors().items()}
    if spec.projector.joins_global:
        rows, columns = shapes[JOINED][1]
        half = rows, columns // 2
        shapes |= {JOINED: (MMPROJ, half), LOCAL: (HEADS, half)}
    return shapes


def _places(file: str, opened: list[GgufFile], spec: ModelSpec) -> Iterator[tuple[str, tuple[GgufFile, StoredTensor]]]:
    """Canonical names of what the parts of one file hold; raises BundleError for what does not belong there."""
    expected, seen = _expected(spec), set[str]()
    for part in opened:
        for name, stored in part.tensors.items():
            canonical = name if file == HEADS else _canonical(name)
            if canonical in seen or expected.get(canonical, ("",))[0] != file:
                what = "twice" if canonical in seen else "which this model does not have there"
                said = name if name.isprintable() else ascii(name)
                raise BundleError(f"{part.path} has the tensor {said:.120} {what}; export it again")
            seen.add(canonical)
            yield canonical, (part, stored)


def _canonical(stored: str) -> str:
    """layout.NAMES the other way; "" for a name that it cannot have made."""
    if stored in _CANONICAL:
        return _CANONICAL[stored]
    stem, dot, leaf = stored.rpartition(".")
    layer = re.search(r"(?<=blk\.)\d+(?=\.)", stem)
    pattern = stem[: layer.start()] + "{i}" + stem[layer.end() :] if layer else stem
    return _CANONICAL[pattern].replace("{i}", layer[0] if layer else "") + dot + leaf if pattern in _CANONICAL else ""


def _padded_axis(name: str) -> int | None:
    found = re.fullmatch(r"vision\.layers\.\d+\.(.+)", name)
    return _PADDED_AXIS.get(found[1]) if found else None


def _covers(outer: Shape, inner: Shape, padded: int | None) -> bool:
    """Is `outer` of shape `inner`, or longer at the one axis that may be padded?"""
    if len(outer) != len(inner):
        return False
    return all(a == b or (axis == padded and a > b) for axis, (a, b) in enumerate(zip(outer, inner, strict=True)))


def _coarser(fold: Grain, local: Grain) -> Grain:
    """The grain of a difference of both: the coarser in everything."""
    both = fold, local
    group, whole, share = (max(getattr(grain, part) for grain in both) for part in ("group", "whole", "share"))
    digits = min((grain.mantissa for grain in both if grain.mantissa), default=0)
    return Grain(min(fold.bits, local.bits), group, 2, whole, share, digits)
