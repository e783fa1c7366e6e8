"""The graphs of the region heads: coordinates and sizes to embeddings, hidden states to their logits."""

from __future__ import annotations

from vlmedge.exporters.onnx.graph import F32, Graph
from vlmedge.exporters.onnx.linear import linear
from vlmedge.exporters.onnx.pointwise import fourier, mlp
from vlmedge.spec import ModelSpec, RegionSpec

HEADS = ("coord_encoder", "coord_decoder", "size_encoder", "size_decoder")


def region_head(g: Graph, spec: ModelSpec, head: str) -> None:
    """`input` f32 [1, n] -> `output` f32 [1, m].

    Encoders take a coordinate (n = 1) or width and height (n = 2) in 0..1 and give an embedding; decoders take a hidden
    state and give logits over bins, those of width and height one after the other.
    """
    region = spec.region
    assert region is not None
    part, _, direction = head.partition("_")
    if direction == "encoder":
        x = g.input("input", F32, (1, 1 if part == "coord" else 2))
        out = linear(g, fourier(g, x, f"region.{part}_features"), f"region.{head}")
        g.output(out, "output", F32, (1, spec.decoder.width))
        return
    x = g.input("input", F32, (1, spec.decoder.width))
    out = mlp(g, x, f"region.{head}", region.activation)
    g.output(out, "output", F32, (1, _bins(region, part)))


def _bins(region: RegionSpec, part: str) -> int:
    return region.coord_bins if part == "coord" else 2 * region.size_bins
