"""Matrix products and embeddings in every kind and flavour: one function a form, chosen by the weight's kind."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vlmedge.exporters.onnx.graph import F32, Graph
from vlmedge.exporters.onnx.kinds import F16, INT8, Kind
from vlmedge.exporters.onnx.store import Form, Weight

_TINIEST = 1e-20  # scale of a row of zeros, whose codes then are zero
_CODES = 127.0


def linear(g: Graph, x: ir.Value, *names: str) -> ir.Value:
    """Rows x f32 [rows, k] times the matrices `NAME.weight` [n_i, k], stacked, plus biases: f32 [rows, sum of n_i].

    Matrices of different kinds are multiplied one by one and joined.
    """
    kinds = [g.kinds[f"{name}.weight"] for name in names]
    if len(set(kinds)) > 1:
        return g.node("Concat", *(linear(g, x, name) for name in names), axis=1)
    sources = tuple(f"{name}.weight" for name in names)
    biased = f"{names[0]}.bias" in g.store.shapes
    bias = vector(g, *(f"{name}.bias" for name in names)) if biased else None
    return product(g, x, sources, kinds[0], bias)


def product(
    g: Graph, x: ir.Value, sources: tuple[str, ...], kind: Kind, bias: ir.Value | None, note: str = ""
) -> ir.Value:
    """Rows times the stacked matrices of one kind; the form in which they are stored follows from kind and flavour.

    `note`: why the kind is not the plan's.
    """
    integers = not kind.floating and (not kind.block or g.flavour == "portable")
    form: Form = "columns" if integers else "rows"
    weight = g.store.weight(g.name, sources, kind, form, note, prefill=not g.prefill.isdisjoint(sources))
    if kind.floating:
        return g.node("Gemm", x, _floats(g, weight), *([bias] if bias else []), transB=1)
    if kind.activations:
        out = _integer_product(g, x, weight)
        return out if bias is None else g.node("Add", out, bias)
    if g.flavour == "ort":
        return _block_product(g, x, weight, bias)
    out = g.node("MatMul", x, _dequantized(g, weight))
    return out if bias is None else g.node("Add", out, bias)


def vector(g: Graph, *sources: str) -> ir.Value:
    """A stored f32 vector, or several one after another."""
    return g.load(g.store.weight(g.name, sources).sections["values"])


def embedding(g: Graph, ids: ir.Value, source: str) -> ir.Value:
    """Rows `ids` int64 [1, n] of a table [vocab, width]: f32 [1, n, width].

    Standard operators in both flavours: GatherBlockQuantized is missing in the builds of onnxruntime-web that
    transformers.js loads, and a few rows cost nothing either way.
    """
    kind, note = table_kind(g, source)
    weight = g.store.weight(g.name, (source,), kind, note=note)
    if kind.floating:
        rows = g.node("Gather", g.load(weight.sections["values"]), ids, axis=0)
        return rows if kind.bits == 32 else g.node("Cast", rows, to=F32.value)
    codes, sections = weight.sections["codes"], weight.sections
    packed = g.load(codes, (weight.rows, codes.shape[1] * codes.shape[2]))
    blocks = g.reshape(_picked_codes(g, packed, ids, kind.bits), 0, 0, -1, kind.block)
    zeros = g.const(float(1 << (kind.bits - 1)), np.float32)
    if "zeros" in sections:
        every = _picked_codes(g, g.load(sections["zeros"]), ids, kind.bits)
        groups = g.node("Slice", every, g.i64(0), g.i64(kind.groups(weight.columns)), g.i64(2))
        zeros = g.node("Unsqueeze", groups, g.i64(-1))
    factors = g.node("Unsqueeze", g.node("Gather", _scales(g, weight), ids, axis=0), g.i64(-1))
    return g.reshape(g.node("Mul", g.node("Sub", blocks, zeros), factors), 0, 0, weight.columns)


def _picked_codes(g: Graph, table: ir.Value, ids: ir.Value, bits: int) -> ir.Value:
    """Rows of uint8 codes as f32; of two 4-bit codes in a byte the low one comes first."""
    values = g.node("Cast", g.node("Gather", table, ids, axis=0), to=F32.value)
    if bits == 8:
        return values
    high = g.node("Floor", g.node("Mul", values, g.const(1 / 16, np.float32)))
    low = g.node("Sub", values, g.node("Mul", high, g.const(16.0, np.float32)))
    pairs = (g.node("Unsqueeze", part, g.i64(-1)) for part in (low, high))
    return g.reshape(g.node("Concat", *pairs, axis=-1), 0, 0, -1)


def table_kind(g: Graph, source: str) -> tuple[Kind, str]:
    """The kind in which a table is stored for reading rows, and why it is not the plan's."""
    kind, (_, width), note = g.kinds[source], g.store.shapes[source], ""
    if kind.floating:
        return kind, note
    if kind.activations:
        kind, note = INT8, "a table's rows are read, not multiplied"
    if width % kind.block:
        return F16, f"rows of {width} have no blocks of {kind.block}"
    return kind, note


def _floats(g: Graph, weight: Weight) -> ir.Value:
    values = g.load(weight.sections["values"])
    return values if weight.kind.bits == 32 else _as_f32(g, values)


def _scales(g: Graph, weight: Weight) -> ir.Value:
    """Scales as f32; the runtime folds the cast when it loads the model, so halves cost nothing."""
    scales = g.load(weight.sections["scales"])
    return scales if not weight.kind.block else _as_f32(g, scales)


def _as_f32(g: Graph, value: ir.Value) -> ir.Value:
    key = ("f32", value.name)
    if key not in g.memo:
        g.memo[key] = g.node("Cast", value, to=F32.value)
    return g.memo[key]


def _block_product(g: Graph, x: ir.Value, weight: Weight, bias: ir.Value | None) -> ir.Value:
    kind = weight.kind
    zeros = g.load(weight.sections["zeros"]) if "zeros" in weight.sections else None
    # accuracy_level 4: products of 8-bit integers, 2 to 3 times as fast as floats at the same error here.
    return g.contrib(
        "MatMulNBits", x, g.load(weight.sections["codes"]), _scales(g, weight), zeros, None, bias,
        K=weight.columns, N=weight.rows, bits=kind.bits, block_size=kind.block, accuracy_level=4,
    )  # fmt: skip


def _dequantized(g: Graph, weight: Weight) -> ir.Value:
    sections = weight.sections
    zeros = [g.load(sections["zeros"])] if "zeros" in sections else []
    codes, scales = g.load(sections["codes"]), _scales(g, weight)
    return g.node("DequantizeLinear", codes, scales, *zeros, axis=0, block_size=weight.kind.block)


def _integer_product(g: Graph, x: ir.Value, weight: Weight) -> ir.Value:
    codes, scale = _quantized_rows(g, x)
    matrix, columns, middle = g.load(weight.sections["codes"]), g.load(weight.sections["scales"]), _middle(g)
    if g.flavour == "ort":
        one = g.const(1.0, np.float32)
        sums = g.contrib("MatMulIntegerToFloat", codes, matrix, one, columns, middle)
        return g.node("Mul", sums, scale)
    sums = g.node("Cast", g.node("MatMulInteger", codes, matrix, middle), to=F32.value)
    return g.node("Mul", g.node("Mul", sums, columns), scale)


def _quantized_rows(g: Graph, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Codes uint8 around 128 of each row of x, and the rows' scales f32 [rows, 1]; once for all that read x."""
    if ("codes", id(x)) not in g.memo:
        largest = g.node("ReduceMax", x, g.i64(1), keepdims=1)
        least = g.node("Neg", g.node("ReduceMin", x, g.i64(1), keepdims=1))
        size = g.node("Max", largest, least, g.const(_TINIEST, np.float32))
        stretched = g.node("Mul", x, g.node("Div", g.const(_CODES, np.float32), size))
        g.memo["codes", id(x)] = g.node("QuantizeLinear", stretched, g.const(1.0, np.float32), _middle(g))
        g.memo["scale", id(x)] = g.node("Mul", size, g.const(1.0 / _CODES, np.float32))
    return g.memo["codes", id(x)], g.memo["scale", id(x)]


def _middle(g: Graph) -> ir.Value:
    return g.const(128, np.uint8)
