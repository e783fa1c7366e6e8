"""What a model asks of a machine, by its spec and its stored sizes, and what part of the ceiling it reached."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from vlmedge.bundle import open_bundle
from vlmedge.device_bench.job import Variant
from vlmedge.device_bench.result import Ceiling, Costs
from vlmedge.exporters import EXPORTERS
from vlmedge.spec import DecoderSpec, Image, ModelSpec, VisionSpec, component

TABLE = "decoder.embed.weight"
_BYTES = {"f32": 4, "bf16": 2, "f16": 2}


def costs(variant: Variant, spec: ModelSpec, positions: float) -> Costs:
    """What a variant's model asks for; a token is counted with `positions` in the KV cache.

    Weights count as they are stored, read once per token. A runtime that keeps another form reads other bytes: ONNX
    Runtime on the CPU turns f16 weights and scales into f32 when it loads them, llama.cpp repacks without changing
    sizes. Headers of the bundle's files are read, with the format's own library: measure memory first. Raises
    BundleError as `open_bundle` and `Exporter.read`.
    """
    if variant.is_original:
        item = _BYTES[variant.dtype or "f32"]
        sizes: Mapping[str, float] = {name: item * math.prod(shape) for name, shape in spec.tensors().items()}
        kv_position = 2.0 * spec.decoder.layers * spec.decoder.kv_heads * spec.decoder.head_dim * item
    else:
        bundle = open_bundle(Path(variant.source))
        sizes = EXPORTERS[variant.format].read(bundle.manifest.model, bundle.path).bytes
        kv_position = bundle.manifest.memory.kv_per_position
    return Costs(
        flops_per_crop=crop_flops(spec.vision),
        flops_prefill=prefill_flops(spec),
        weight_bytes_per_token=read_per_token(spec.decoder, sizes),
        kv_bytes_per_token=kv_position * positions,
    )


def read_per_token(decoder: DecoderSpec, sizes: Mapping[str, float]) -> float:
    """Bytes of weights that one decoded token reads, of the stored bytes of every tensor.

    `sizes`: canonical name -> bytes, scales and padding included, as `Readback.bytes`. Second copies, `NAME#prefill`
    (for calls of many positions) and `NAME#2` (a tied table's, for embeddings), are not read; nor is the table of
    embeddings, but for one row, unless it is the head too.
    """
    read = {name: size for name, size in sizes.items() if component(name) == "decoder" and "#" not in name}
    if not decoder.tied_head:
        del read[TABLE]
    return float(sum(read.values()))


def crop_flops(vision: VisionSpec) -> float:
    """FLOPs of one crop's matrix products in the tower, attention's included."""
    w, m, n = vision.width, vision.mlp_width, vision.tokens
    layer = 2.0 * n * (4 * w * w + 2 * w * m) + 4.0 * n * n * w
    return vision.layers * layer + 2.0 * n * w * vision.channels * vision.patch_size**2


def prefill_flops(spec: ModelSpec) -> float:
    """FLOPs of the matrix products of one picture's prefill: its positions, those before it, one row of logits.

    Attention counts the pairs that see each other: half of them in a causal decoder.
    """
    d, n = spec.decoder, picture_positions(spec)
    q, kv, mlp = d.heads * d.head_dim, d.kv_heads * d.head_dim, (3 if d.gated else 2) * d.width * d.mlp_width
    pairs = n * n if d.bidirectional_prefix else n * (n + 1) / 2
    layer = 2.0 * n * (d.width * (2 * q + 2 * kv) + mlp) + 4.0 * pairs * q
    return d.layers * layer + 2.0 * d.width * d.vocab


def picture_positions(spec: ModelSpec) -> int:
    """Positions up to the end of the first picture: what every question about it shares. The longest of the templates'.

    Only what stands literally before the picture counts (`Ids`).
    """
    before = [
        sum(len(getattr(part, "ids", ())) for part in template[: template.index(Image())])
        for template in spec.prompt.templates.values()
        if Image() in template
    ]
    return spec.image_tokens + max(before, default=0)


def reached(ms: Mapping[str, float], encoded_crops: float, costs: Costs, ceiling: Ceiling) -> dict[str, float]:
    """Fractions of the ceiling by stage, for the stages in `ms` whose ceiling was measured.

    `ms`: medians in milliseconds: "vision" (all crops), "prefill", "decode" (a token). Vision and prefill are held
    against the fastest product that was measured, of whatever type; decode against the bandwidth. The ceiling is a
    processor's: leave variants out that compute elsewhere.
    """
    product, bandwidth = max(ceiling.gemm.values(), default=0.0), ceiling.bandwidth
    work = {
        "vision": (costs.flops_per_crop * encoded_crops, product),
        "prefill": (costs.flops_prefill, product),
        "decode": (costs.weight_bytes_per_token + costs.kv_bytes_per_token, bandwidth),
    }
    return {
        stage: amount / (ms[stage] * 1e-3) / (rate * 1e9)
        for stage, (amount, rate) in work.items()
        if ms.get(stage, 0.0) > 0 and rate > 0
    }
