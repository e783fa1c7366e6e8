"""Self-attention of a decoder with its keys and values: rotary positions, grouped heads, a bidirectional prefix.

Flavour "ort" uses GroupQueryAttention, which takes a buffer longer than what is alive and writes into it in place
(shared), or one of exactly what is alive (growing). Flavour "portable" grows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlmedge.errors import UnsupportedError
from vlmedge.exporters.onnx.graph import F32, I8, Graph
from vlmedge.spec import DecoderSpec

UNSEEN = -1e30  # finite, so that no row of a mask can give NaN
_TURNED = 16  # dimensions that GroupQueryAttention rotates come in multiples of this


@dataclass(frozen=True, slots=True)
class Place:
    """Where the new positions stand, computed once for all layers.

    `last` int32 [1] and `total` int32: positions alive at the end, less one and all. `ids` int64 [1, sequence].
    `mask`: f32 [1, 1, sequence, total] to add to scores, or bool in the portable flavour; None: causal.
    `fresh`: bool, nothing was alive before.
    """

    last: ir.Value
    total: ir.Value
    ids: ir.Value
    mask: ir.Value | None
    fresh: ir.Value
    cos: ir.Value
    sin: ir.Value


@dataclass(slots=True)
class Kv:
    """Keys and values of every layer: inputs `past_key_values.N.key|value`, outputs `present.N.key|value`.

    `type`: "f32", or "int8" with a stored scale for each channel of a head.
    """

    g: Graph
    spec: DecoderSpec
    type: str
    presents: list[tuple[ir.Value, ir.Value]] = field(default_factory=list)

    def past(self, layer: int) -> tuple[ir.Value, ir.Value]:
        """Declare one layer's inputs, f32 or int8 [1, kv_heads, past, head_dim]."""
        dtype = I8 if self.type == "int8" else F32
        shape = (1, self.spec.kv_heads, "past_sequence_length", self.spec.head_dim)
        key, value = (self.g.input(f"past_key_values.{layer}.{part}", dtype, shape) for part in ("key", "value"))
        return key, value

    def scales(self, layer: int) -> tuple[ir.Value, ir.Value]:
        """One layer's stored scales, f32 [1, kv_heads, 1, head_dim]."""
        g, shape = self.g, (1, self.spec.kv_heads, 1, self.spec.head_dim)
        return g.load(g.store.kv_scale(g.name, layer, "k", shape)), g.load(g.store.kv_scale(g.name, layer, "v", shape))

    def declare(self) -> None:
        """Declare the outputs, in the order of the layers."""
        dtype = I8 if self.type == "int8" else F32
        shape = (1, self.spec.kv_heads, "present_sequence_length", self.spec.head_dim)
        for layer, pair in enumerate(self.presents):
            for part, value in zip(("key", "value"), pair, strict=True):
                self.g.output(value, f"present.{layer}.{part}", dtype, shape)


def place(g: Graph, spec: DecoderSpec, embeds: ir.Value, alive: ir.Value, prefix: ir.Value | None) -> Place:
    """Compute where new positions stand from the shapes of `embeds` [1, sequence, width] and `alive` [1, total].

    Raises UnsupportedError for rotary dimensions that the flavour's attention does not have.
    """
    if g.flavour == "ort" and spec.rope_dims % _TURNED:
        raise UnsupportedError(
            f"ONNX Runtime's attention rotates multiples of {_TURNED} dimensions, this decoder {spec.rope_dims}; "
            "choose the flavour portable"
        )
    new, total = g.dim(embeds, 1), g.dim(alive, 1)
    fresh = g.node("Equal", new, total)
    rows = g.node("Range", g.node("Sub", total, new), total, g.const(1, np.int64))
    count = g.node("Cast", total, to=ir.DataType.INT32.value)
    last = g.node("Unsqueeze", g.node("Sub", count, g.const(1, np.int32)), g.i64(0))
    cos, sin = (g.const(table, np.float32) for table in rope_tables(spec))
    mask = None
    if prefix is not None or g.flavour == "portable":
        mask = _mask(g, rows, total, None if prefix is None else _limit(g, prefix, new, fresh))
    return Place(last, count, g.node("Unsqueeze", rows, g.i64(0)), mask, fresh, cos, sin)


def attention(g: Graph, spec: DecoderSpec, packed: ir.Value, layer: int, kv: Kv, at: Place) -> ir.Value:
    """Rows of packed queries, keys and values (heads + 2 kv_heads of them) -> rows [sequence, heads * head_dim]."""
    past = kv.past(layer)
    if g.flavour == "portable":
        out, key, value = _standard(g, spec, packed, past, at)
    elif kv.type == "int8":
        out, key, value = _quantized(g, spec, packed, past, kv.scales(layer), at)
    else:
        out, key, value = _grouped(g, spec, _batched(g, packed), past, (None, None), at)
    kv.presents.append((key, value))
    return g.reshape(out, -1, spec.heads * spec.head_dim)


def rope_tables(spec: DecoderSpec) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Cos and sin f32 [context, rope_dims / 2]; theta_i = rope_theta ** (-2 i / rope_dims)."""
    powers = np.arange(0, spec.rope_dims, 2, dtype=np.float32) / np.float32(spec.rope_dims)
    inverse = np.float32(1.0) / np.power(np.float32(spec.rope_theta), powers)
    angles = np.outer(np.arange(spec.context, dtype=np.float32), inverse)
    return np.cos(angles), np.sin(angles)


def _limit(g: Graph, prefix: ir.Value, new: ir.Value, fresh: ir.Value) -> ir.Value:
    """Keys below this are seen from everywhere.

    A negative prefix, the default, holds where the first call brings all of it: a picture and perhaps a question. A
    text without a picture is shorter, so consumers that know nothing of `prefix_len` get it right too.
    """
    zero, size = g.const(0, np.int64), g.node("Neg", prefix)
    whole = g.node("And", fresh, g.node("GreaterOrEqual", new, size))
    return g.node("Where", g.node("Less", prefix, zero), g.node("Where", whole, size, zero), prefix)


def _mask(g: Graph, rows: ir.Value, total: ir.Value, limit: ir.Value | None) -> ir.Value:
    """Who sees whom: keys up to the query's own position, and all keys below `limit`."""
    keys = g.node("Unsqueeze", g.node("Range", g.const(0, np.int64), total, g.const(1, np.int64)), g.i64(0))
    seen = g.node("LessOrEqual", keys, g.node("Unsqueeze", rows, g.i64(1)))
    if limit is not None:
        seen = g.node("Or", seen, g.node("Less", keys, limit))
    if g.flavour == "portable":
        return seen
    bias = g.node("Where", seen, g.const(0.0, np.float32), g.const(UNSEEN, np.float32))
    return g.node("Unsqueeze", bias, g.i64(0, 1))


def _batched(g: Graph, packed: ir.Value) -> ir.Value:
    return g.node("Unsqueeze", packed, g.i64(0))


def _grouped(
    g: Graph,
    spec: DecoderSpec,
    packed: ir.Value,
    past: tuple[ir.Value | None, ir.Value | None],
    scales: tuple[ir.Value | None, ir.Value | None],
    at: Place,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """GroupQueryAttention. With a mask it must not be causal itself: the mask says all."""
    inputs: list[ir.Value | None] = [packed, None, None, *past, at.last, at.total, at.cos, at.sin, None, at.mask]
    facts: dict[str, object] = {}
    if scales[0] is not None:
        inputs += [None, *scales]
        facts = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    while inputs[-1] is None:
        inputs.pop()
    out, key, value = g.nodes_of(
        "GroupQueryAttention", *inputs, count=3, domain="com.microsoft", num_heads=spec.heads,
        kv_num_heads=spec.kv_heads, do_rotary=1, causal=0 if at.mask is not None else 1, **facts,
    )  # fmt: skip
    return out, key, value


def _quantized(
    g: Graph,
    spec: DecoderSpec,
    packed: ir.Value,
    past: tuple[ir.Value, ir.Value],
    scales: tuple[ir.Value, ir.Value],
    at: Place,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Int8 keys and values. The first call attends to what it computes itself, in f32, and only then rounds it.

    Attention over an int8 cache takes five times as long for many rows, and rounding would not help them.
    """
    rows = _batched(g, packed)
    first, later = g.branch(), g.branch()
    out, key, value = _grouped(first, spec, rows, (None, None), (None, None), at)
    for made in (out, *(_rounded(first, x, scale) for x, scale in zip((key, value), scales, strict=True))):
        first.outputs.append(made)
    later.outputs.extend(_grouped(later, spec, rows, past, scales, at))
    out, key, value = g.nodes_of(
        "If", at.fresh, count=3, then_branch=first.subgraph("first"), else_branch=later.subgraph("later")
    )
    return out, key, value


def _rounded(g: Graph, x: ir.Value, scale: ir.Value) -> ir.Value:
    return g.node("QuantizeLinear", g.node("Div", x, scale), g.const(1.0, np.float32), g.const(0, np.int8))


def _standard(
    g: Graph, spec: DecoderSpec, packed: ir.Value, past: tuple[ir.Value, ir.Value], at: Place
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Attention and RotaryEmbedding of opset 23, heads apart from the start."""
    q, kv, dim = spec.heads, spec.kv_heads, spec.head_dim
    split = g.nodes_of("Split", packed, g.i64(q * dim, kv * dim, kv * dim), count=3, axis=1)
    query, key, value = (
        g.node("Transpose", g.reshape(part, 1, -1, heads, dim), perm=[0, 2, 1, 3])
        for part, heads in zip(split, (q, kv, kv), strict=True)
    )
    if spec.rope_dims:  # the operator takes 0 for all dimensions
        query, key = (
            g.node("RotaryEmbedding", x, at.cos, at.sin, at.ids, rotary_embedding_dim=spec.rope_dims % dim)
            for x in (query, key)
        )
    out, key, value = g.nodes_of("Attention", query, key, value, at.mask, *past, count=3)
    return g.node("Transpose", out, perm=[0, 2, 1, 3]), key, value
