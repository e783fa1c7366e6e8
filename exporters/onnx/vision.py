"""The graph of a vision transformer: normalised crops in, features out, any number of crops at once."""

from __future__ import annotations

import onnx_ir as ir

from vlmedge.exporters.onnx.graph import F32, Graph
from vlmedge.exporters.onnx.kinds import F16
from vlmedge.exporters.onnx.linear import linear, vector
from vlmedge.exporters.onnx.pointwise import mlp, norm
from vlmedge.spec import VisionSpec


def vision_encoder(g: Graph, spec: VisionSpec) -> None:
    """`pixel_values` f32 [num_crops, channels, size, size] -> `image_features` f32 [num_crops, tokens, width]."""
    size = spec.image_size
    pixels = g.input("pixel_values", F32, ("num_crops", spec.channels, size, size))
    x = _patches(g, spec, pixels)
    for i in range(spec.layers):
        x = _layer(g, spec, x, f"vision.layers.{i}")
    if spec.post_norm:
        x = norm(g, x, "vision.post_norm", "layer", spec.norm_eps)
    features = g.reshape(x, -1, spec.tokens, spec.width)
    g.output(features, "image_features", F32, ("num_crops", spec.tokens, spec.width))


def _patches(g: Graph, spec: VisionSpec, pixels: ir.Value) -> ir.Value:
    """Rows f32 [num_crops * tokens, width]: each patch by one convolution, and its position."""
    name = "vision.patch.weight"
    kind, note = g.kinds[name], ""
    if not kind.floating:
        kind, note = F16, f"a convolution's kernel has no {kind.name} form"
    kernel = g.store.weight(g.name, (name,), kind, note=note)
    values = g.load(kernel.sections["values"])
    if kernel.kind.bits == 16:
        values = g.node("Cast", values, to=F32.value)
    side = [spec.patch_size] * 2
    grid = g.node("Conv", pixels, values, vector(g, "vision.patch.bias"), kernel_shape=side, strides=side)
    rows = g.node("Transpose", g.reshape(grid, 0, spec.width, -1), perm=[0, 2, 1])
    return g.reshape(g.node("Add", rows, vector(g, "vision.position")), -1, spec.width)


def _layer(g: Graph, spec: VisionSpec, x: ir.Value, name: str) -> ir.Value:
    h = norm(g, x, f"{name}.norm1", "layer", spec.norm_eps)
    x = g.node("Add", x, _attention(g, spec, h, f"{name}.attn"))
    h = norm(g, x, f"{name}.norm2", "layer", spec.norm_eps)
    return g.node("Add", x, mlp(g, h, f"{name}.mlp", spec.activation))


def _attention(g: Graph, spec: VisionSpec, x: ir.Value, name: str) -> ir.Value:
    """Every token of a crop sees every other; rows in, rows out."""
    q, k, v = (g.reshape(linear(g, x, f"{name}.{part}"), -1, spec.tokens, spec.width) for part in "qkv")
    if g.flavour == "ort":
        mixed = g.contrib("MultiHeadAttention", q, k, v, num_heads=spec.heads)
    else:
        mixed = g.node("Attention", q, k, v, q_num_heads=spec.heads, kv_num_heads=spec.heads)
    return linear(g, g.reshape(mixed, -1, spec.width), f"{name}.out")
