"""What the graphs of one export store: matrices and vectors made of canonical tensors, and where their bytes lie.

A weight is asked for by its sources, kind and form; whoever asks second, in whichever graph, gets the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import onnx_ir as ir

from vlmedge.exporters.onnx.kinds import F32, Kind
from vlmedge.spec import Shape

Form = Literal["rows", "columns"]


@dataclass(slots=True)
class Section:
    """One stored array. File and offset are given to it when all of them are known."""

    name: str
    dtype: ir.DataType
    shape: Shape
    file: str = ""
    offset: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of its data."""
        return math.ceil(math.prod(self.shape) * self.dtype.bitwidth / 8)


@dataclass(frozen=True, slots=True)
class Weight:
    """Canonical tensors stacked along their first axis: `rows` times `columns` values (1 column: a vector).

    `form` "columns": the matrix is stored transposed. `sections`: "values", or "codes", "scales" and perhaps "zeros".
    `prefill`: it belongs to the copy of the decoder's layers that is used for prefill only.
    """

    name: str
    sources: tuple[str, ...]
    shapes: tuple[Shape, ...]
    kind: Kind
    form: Form
    graph: str
    note: str
    prefill: bool
    sections: dict[str, Section]

    @property
    def rows(self) -> int:
        """Rows of all sources together."""
        return sum(shape[0] for shape in self.shapes)

    @property
    def columns(self) -> int:
        """Elements of one row; 1 of a vector."""
        return math.prod(self.shapes[0][1:])

    def pieces(self) -> Iterator[tuple[str, int, int]]:
        """Each source with its first row and its number of rows."""
        at = 0
        for source, shape in zip(self.sources, self.shapes, strict=True):
            yield source, at, shape[0]
            at += shape[0]


@dataclass(frozen=True, slots=True)
class KvScale:
    """Scales of one layer's int8 keys or values, one for each channel; computed from the rows that project to them."""

    layer: int
    part: Literal["k", "v"]
    section: Section
    graph: str


@dataclass(slots=True)
class Store:
    """Every weight of an export, each once, in the order in which the graphs asked for them."""

    shapes: dict[str, Shape]
    weights: dict[tuple[tuple[str, ...], str, Form], Weight] = field(default_factory=dict)
    kv_scales: dict[tuple[int, str], KvScale] = field(default_factory=dict)

    def weight(
        self,
        graph: str,
        sources: tuple[str, ...],
        kind: Kind = F32,
        form: Form = "rows",
        note: str = "",
        prefill: bool = False,
    ) -> Weight:
        """Return the stored weight of these sources in this kind and form."""
        key = (sources, kind.name, form)
        if key not in self.weights:
            shapes = tuple(self.shapes[source] for source in sources)
            name = _name(sources) + ("#prefill" if prefill else "")
            found = Weight(name, sources, shapes, kind, form, graph, note, prefill, {})
            found.sections.update(_sections(found))
            self.weights[key] = found
        return self.weights[key]

    def kv_scale(self, graph: str, layer: int, part: Literal["k", "v"], shape: Shape) -> Section:
        """Return the stored scales of one layer's int8 keys or values."""
        if (layer, part) not in self.kv_scales:
            section = Section(f"decoder.layers.{layer}.attn.{part}.kv_scale", ir.DataType.FLOAT, shape)
            self.kv_scales[layer, part] = KvScale(layer, part, section, graph)
        return self.kv_scales[layer, part].section

    def sections(self) -> Iterator[tuple[str, Section]]:
        """Every section with the graph whose data file it goes to."""
        for weight in self.weights.values():
            yield from ((weight.graph, section) for section in weight.sections.values())
        yield from ((scale.graph, scale.section) for scale in self.kv_scales.values())


def _name(sources: tuple[str, ...]) -> str:
    """`decoder.layers.0.attn.q+k+v.weight` for three sources."""
    if len(sources) == 1:
        return sources[0]
    front, _, leaf = sources[0].rpartition(".")
    stem = front.rpartition(".")[0]
    return f"{stem}.{'+'.join(source.split('.')[-2] for source in sources)}.{leaf}"


def _sections(weight: Weight) -> dict[str, Section]:
    kind, n, k = weight.kind, weight.rows, weight.columns
    groups = kind.groups(k)

    def section(role: str, dtype: ir.DataType, *shape: int) -> Section:
        return Section(weight.name if role == "values" else f"{weight.name}.{role}", dtype, shape)

    if kind.floating:
        dtype = ir.DataType.FLOAT if kind.bits == 32 else ir.DataType.FLOAT16
        return {"values": section("values", dtype, n, *weight.shapes[0][1:])}
    if not kind.block:
        return {
            "codes": section("codes", ir.DataType.INT8, k, n),
            "scales": section("scales", ir.DataType.FLOAT, n),
        }
    if weight.form == "columns":
        narrow = ir.DataType.INT4 if kind.symmetric else ir.DataType.UINT4
        out = {
            "codes": section("codes", narrow if kind.bits == 4 else ir.DataType.INT8, k, n),
            "scales": section("scales", ir.DataType.FLOAT16, groups, n),
        }
        return out if kind.symmetric else out | {"zeros": section("zeros", narrow, groups, n)}
    out = {
        "codes": section("codes", ir.DataType.UINT8, n, groups, kind.block * kind.bits // 8),
        "scales": section("scales", ir.DataType.FLOAT16, n, groups),
    }
    return out if kind.symmetric else out | {"zeros": section("zeros", ir.DataType.UINT8, n, kind.zero_bytes(k))}
