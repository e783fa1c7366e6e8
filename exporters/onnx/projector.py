"""The graph of a projector: a picture's features in, decoder embeddings out."""

from __future__ import annotations

import onnx_ir as ir

from vlmedge.exporters.onnx.graph import F32, I64, TO_THE_END, Graph
from vlmedge.exporters.onnx.pointwise import mlp
from vlmedge.spec import ModelSpec


def vision_projection(g: Graph, spec: ModelSpec) -> None:
    """`image_features` f32 [num_crops, tokens, width] -> `image_embeds` f32 [1, image tokens, decoder width].

    Where the projector joins global and local features, `stitch_index` int64 [rows, columns] says which of the local
    crops' feature rows lands where, and `pool_rows` f32 [side, rows], `pool_columns` f32 [side, columns] average the
    stitched grid to one crop's.
    """
    vision, width = spec.vision, spec.decoder.width
    features = g.input("image_features", F32, ("num_crops", vision.tokens, vision.width))
    rows = _joined(g, spec, features) if spec.projector.joins_global else g.reshape(features, -1, vision.width)
    out = mlp(g, rows, "projector", spec.projector.activation)
    g.output(g.node("Unsqueeze", out, g.i64(0)), "image_embeds", F32, (1, spec.image_tokens, width))


def _joined(g: Graph, spec: ModelSpec, features: ir.Value) -> ir.Value:
    """Rows [tokens, 2 * width]: the global crop's features beside the pooled grid of the local crops'."""
    vision = spec.vision
    side = vision.grid
    index = g.input("stitch_index", I64, ("grid_rows", "grid_columns"))
    down = g.input("pool_rows", F32, (side, "grid_rows"))
    across = g.input("pool_columns", F32, (side, "grid_columns"))
    crops = g.reshape(features, -1, vision.width)
    whole = g.node("Slice", crops, g.i64(0), g.i64(vision.tokens), g.i64(0))
    local = g.node("Slice", crops, g.i64(vision.tokens), g.i64(TO_THE_END), g.i64(0))
    grid = g.node("Gather", local, index, axis=0)
    # [side, rows] x [rows, columns * width], then [side, columns] x [side, columns, width]
    flat = g.node("Reshape", grid, g.node("Concat", g.node("Shape", grid, start=0, end=1), g.i64(-1), axis=0))
    pooled = g.node("MatMul", down, flat)
    wide = g.node("Concat", g.i64(side), g.node("Shape", grid, start=1, end=2), g.i64(vision.width), axis=0)
    pooled = g.node("MatMul", across, g.node("Reshape", pooled, wide))
    return g.node("Concat", whole, g.reshape(pooled, -1, vision.width), axis=1)
