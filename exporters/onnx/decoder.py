"""The graph of a decoder: one for prefill, prompt and decode; keys and values in and out, shared or growing."""

from __future__ import annotations

import onnx_ir as ir

from vlmedge.exporters.onnx.attention import Kv, Place, attention, place
from vlmedge.exporters.onnx.graph import F32, I64, TO_THE_END, Graph
from vlmedge.exporters.onnx.linear import embedding, linear, product, table_kind
from vlmedge.exporters.onnx.pointwise import mlp, norm
from vlmedge.spec import DecoderSpec


def embed_tokens(g: Graph, spec: DecoderSpec) -> None:
    """`input_ids` int64 [1, sequence] -> `inputs_embeds` f32 [1, sequence, width]."""
    ids = g.input("input_ids", I64, (1, "sequence_length"))
    rows = embedding(g, ids, "decoder.embed.weight")
    g.output(rows, "inputs_embeds", F32, (1, "sequence_length", spec.width))


def decoder_model(g: Graph, spec: DecoderSpec, kv_type: str, prefix: int) -> None:
    """`inputs_embeds` f32 [1, sequence, width] and keys and values of what came before -> logits, hidden, keys, values.

    `attention_mask` int64 [1, total] only says how many positions are alive at the end. `prefix_len`: keys below it are
    seen from everywhere; its default, -`prefix`, means the same of a first call of at least that length.
    `num_logits_to_keep`: rows of logits, 0 for all. `hidden` is the last row
    before the final norm.
    """
    embeds = g.input("inputs_embeds", F32, (1, "sequence_length", spec.width))
    mask = g.input("attention_mask", I64, (1, "total_sequence_length"))
    kv = Kv(g, spec, kv_type)
    keep = g.default_input("num_logits_to_keep", 1)
    limit = g.default_input("prefix_len", -prefix) if spec.bidirectional_prefix else None
    at = place(g, spec, embeds, mask, limit)
    x = g.reshape(embeds, -1, spec.width)
    for i in range(spec.layers):
        x = _layer(g, spec, x, i, kv, at)
    _last_rows(g, spec, x, keep)
    kv.declare()
    g.facts |= {"vlmedge.kv": "shared" if g.flavour == "ort" else "growing", "vlmedge.kv_type": kv_type}


def _layer(g: Graph, spec: DecoderSpec, x: ir.Value, i: int, kv: Kv, at: Place) -> ir.Value:
    name = f"decoder.layers.{i}"
    h = norm(g, x, f"{name}.norm1", spec.norm, spec.norm_eps)
    packed = linear(g, h, *(f"{name}.attn.{part}" for part in "qkv"))
    mixed = linear(g, attention(g, spec, packed, i, kv, at), f"{name}.attn.out")
    if spec.parallel_residual:
        added = g.node("Add", mixed, mlp(g, h, f"{name}.mlp", spec.activation, spec.gated))
        return g.node("Add", x, added)
    x = g.node("Add", x, mixed)
    h = norm(g, x, f"{name}.norm2", spec.norm, spec.norm_eps)
    return g.node("Add", x, mlp(g, h, f"{name}.mlp", spec.activation, spec.gated))


def _last_rows(g: Graph, spec: DecoderSpec, x: ir.Value, keep: ir.Value) -> None:
    """Logits of the rows that were asked for: all others are cut off before the norm and the head."""
    start = g.node("Unsqueeze", g.node("Neg", keep), g.i64(0))
    rows = g.node("Slice", x, start, g.i64(TO_THE_END), g.i64(0))
    normed = norm(g, rows, "decoder.norm", spec.norm, spec.norm_eps)
    logits = g.node("Unsqueeze", _head(g, spec, normed), g.i64(0))
    last = g.node("Slice", x, g.i64(-1), g.i64(TO_THE_END), g.i64(0))
    g.output(logits, "logits", F32, (1, "num_logits", spec.vocab))
    g.output(g.node("Unsqueeze", last, g.i64(0)), "hidden", F32, (1, 1, spec.width))


def _head(g: Graph, spec: DecoderSpec, x: ir.Value) -> ir.Value:
    if not spec.tied_head:
        return linear(g, x, "decoder.head")
    table = "decoder.embed.weight"
    kind, note = table_kind(g, table)
    return product(g, x, (table,), kind, None, note)
