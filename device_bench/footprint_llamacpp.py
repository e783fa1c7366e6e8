"""The footprint of GGUF bundles in llama.cpp: one copy of the weights, a KV cache that is all there from the start."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from vlmedge.bundle import Manifest
from vlmedge.device_bench.environment import ROOT, cpu_flags
from vlmedge.device_bench.footprint import (
    BASELINES,
    COPIES,
    KV,
    PREFILL,
    VISION,
    WEIGHTS,
    Part,
    Stage,
    Use,
    picture_parts,
    prefill_positions,
    role_bytes,
    vocabulary_parts,
)

_STEP = 256  # the KV cache's length is rounded up to this, and so is the part of it that attention looks at
_ROWS = 11  # [positions, width] float32 beside the scores: inputs twice, residual, norm, q, k, v, their results
# What a processor with AMX adds to a block of weights (ggml/src/ggml-cpu/amx/mmq.cpp): sums of each 32 of Q8_0, scales
# of Q4_K and Q5_K in 8 bits instead of 6.
_AMX: Final = {"Q8_0": 4 / 34, "Q4_K": 4 / 144, "Q5_K": 4 / 176}


def stages(manifest: Manifest, use: Use) -> tuple[Stage, ...]:
    """What is alive while a bundle is opened and answers.

    With memory "fast" the decoder is read into the layout that computes fastest, and nothing of it is mapped; with
    "lean" it is mapped, and the tower is held only while it encodes. libmtmd always reads the tower.
    """
    lean = use.memory == "lean"
    base = (*BASELINES["llamacpp"].parts(), vocabulary_parts(manifest, 2), *_decoder(manifest, use))
    tower = (Part(WEIGHTS, role_bytes(manifest, "mmproj")),)
    kept = () if lean else (*tower, Part(VISION, _tower_rows(manifest)))
    after = (*base, *kept, Part(WEIGHTS, _projector(manifest), mapped=True))
    prefill = Part(PREFILL, _prefill(manifest, use))
    return (
        Stage("open", (*base, *tower)),
        Stage("picture", (*base, *(() if lean else tower), picture_parts(manifest, use, "picture"))),
        Stage("vision", (*base, *tower, picture_parts(manifest, use, "vision"), Part(VISION, _tower_rows(manifest)))),
        Stage("project", (*after, picture_parts(manifest, use, "project"), Part(VISION, _hidden_rows(manifest, use)))),
        Stage("prefill", (*after, prefill)),
        Stage("words", (*after, prefill)),
    )


def _decoder(manifest: Manifest, use: Use) -> tuple[Part, ...]:
    length = -(-use.context // _STEP) * _STEP
    return (
        Part(WEIGHTS, role_bytes(manifest, "text"), mapped=use.memory == "lean"),
        Part(COPIES, _amx(manifest) if use.memory == "fast" and use.local and has_amx() else 0),
        Part(KV, manifest.memory.kv_per_position * length),
    )


def _amx(manifest: Manifest) -> float:
    """Bytes that AMX's layouts take beside the file's."""
    decoder = next(c for c in manifest.components if c.name == "decoder")
    return sum(size * _AMX.get(kind, 0.0) for kind, size in decoder.types.items())


def has_amx(root: Path = ROOT) -> bool:
    """Tell whether this processor multiplies tiles of 8-bit numbers, so that llama.cpp lays weights out for that."""
    return "amx_int8" in cpu_flags(root)


def _tower_rows(manifest: Manifest) -> float:
    """One crop in the tower, float32: rows of a block and of its MLP. Attention is fused, so scores are never held."""
    vision = manifest.model.vision
    return 4.0 * vision.tokens * (8 * vision.width + vision.mlp_width)


def _projector(manifest: Manifest) -> float:
    """The projector's matrices, which are read where they lie in the mapped files."""
    return next(c.bytes for c in manifest.components if c.name == "projector")


def _hidden_rows(manifest: Manifest, use: Use) -> float:
    """The projector's hidden rows float32, twice where local crops are added to the global one; input, output."""
    model = manifest.model
    hidden = model.projector.hidden * (2 if use.crops > 1 else 1)
    return 4.0 * model.vision.tokens * (hidden + model.vision.width + model.decoder.width)


def _prefill(manifest: Manifest, use: Use) -> float:
    """A picture in one piece: scores float32 [heads, positions, keys] and their half precision copy, beside rows."""
    decoder, n = manifest.model.decoder, min(prefill_positions(manifest), use.context)
    keys = -(-n // _STEP) * _STEP
    scores = 6.0 * decoder.heads * n * keys
    mlp = 4.0 * n * decoder.mlp_width * (2 if decoder.gated else 1)
    return max(scores, mlp) + 4.0 * n * (keys + _ROWS * decoder.width)
