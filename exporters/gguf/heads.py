"""heads.gguf: the weights that stock llama.cpp has no place for; tensor names are canonical names.

Metadata:
    general.architecture     "vlmedge-heads"
    general.type             "heads"
    general.name, general.file_type, general.quantization_version, and general.* of `ExportJob.about`

Tensors (numpy order [rows, columns]; ggml's `ne` is the reverse; any ggml type but where f32 is said):
    projector.local.weight        [hidden, vision width]    only where the projector joins global and local features
    region.coord_features         [1, coord_features / 2]   f32
    region.size_features          [2, size_features / 2]    f32
    region.coord_encoder.weight   [width, coord_features]      .bias f32 [width]
    region.coord_decoder.up.weight    [region hidden, width]   .bias f32 [region hidden]
    region.coord_decoder.down.weight  [coord_bins, region hidden]      .bias f32
    region.size_encoder.weight    [width, size_features]       .bias f32 [width]
    region.size_decoder.up.weight     [region hidden, width]   .bias f32 [region hidden]
    region.size_decoder.down.weight   [2 * size_bins, region hidden]   .bias f32

The joined projector is W [global | local] + b. `mm.0.weight` in mmproj.gguf is the fold F = W_global + W_local
(what a picture of a single crop needs, and all that a stock app can use), `mm.0.bias` is b, and
`projector.local.weight` is W_local, so that no weight is stored twice. With global features g and stitched, pooled
local features l: W [g | l] + b = F g + W_local (l - g) + b. `mm.2.{weight,bias}` is projector.down.
"""

from __future__ import annotations

from vlmedge.exporters.gguf.container import Value

ARCHITECTURE = "vlmedge-heads"


def heads_metadata() -> dict[str, Value]:
    """Keys of heads.gguf but for the rest of `general.*`."""
    return {"general.architecture": ARCHITECTURE, "general.type": "heads"}
