"""The footprint of ONNX bundles in ONNX Runtime: matrices prepacked for the processor, arenas that only grow."""

from __future__ import annotations

from vlmedge.bundle import Manifest
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
    largest_matrix,
    picture_parts,
    prefill_positions,
    role_bytes,
    vocabulary_parts,
)

_SCALE = 4  # bytes: float32, whatever the file has
_HEAP = 1.15  # of float32 copies of matrices under 32 MB: glibc keeps what is freed between them


def stages(manifest: Manifest, use: Use) -> tuple[Stage, ...]:
    """What is alive while a bundle is opened and answers, see `_fast` and `_lean`."""
    base = (*BASELINES["onnxruntime"].parts(), vocabulary_parts(manifest, 1))
    return _lean(manifest, use, base) if use.memory == "lean" else _fast(manifest, use, base)


def _fast(manifest: Manifest, use: Use, base: tuple[Part, ...]) -> tuple[Stage, ...]:
    """Every matrix is copied into the layout that computes fastest, and the file's pages are let go.

    Each graph has an arena of its own, which keeps the most that it ever needed.
    """
    decoder = packed(manifest, "decoder")
    rest = packed(manifest, "vision") + packed(manifest, "projector")
    all_ = (*base, Part(WEIGHTS, decoder + rest), Part(COPIES, max(0.0, _fused(manifest) - rest)))
    tower, joined = Part(VISION, _tower_rows(manifest)), Part(VISION, _hidden_rows(manifest))
    after, prefill = (*all_, tower, joined), Part(PREFILL, _prefill(manifest, use))
    return (
        Stage("open", (*base, Part(WEIGHTS, decoder + max(rest, _reading(manifest))))),
        Stage("picture", (*all_, picture_parts(manifest, use, "picture"))),
        Stage("vision", (*all_, picture_parts(manifest, use, "vision"), tower)),
        Stage("project", (*after, picture_parts(manifest, use, "project"))),
        Stage("prefill", (*after, prefill, _first_cache(manifest))),
        Stage("words", (*after, prefill, _cache(manifest, use.used, prefill.bytes))),
    )


def _lean(manifest: Manifest, use: Use, base: tuple[Part, ...]) -> tuple[Stage, ...]:
    """The decoder's prepacked copy is mapped; tower and projector are held while they compute.

    The allocator keeps most of what the tower's matrices took (they are smaller than the 32 MB above which glibc gives
    memory back at once), and later stages use it again. A first opening makes the copy: then the decoder is held
    packed, as its copy is tried, and what was converted from half precision once more.
    """
    decoder, tower, joiner = (packed(manifest, name) for name in ("decoder", "vision", "projector"))
    mapped = (*base, Part(WEIGHTS, decoder, mapped=True))
    making = Part(COPIES, 0.0 if use.prepared else _making(manifest, decoder))
    trying = Part(COPIES, max(_reading(manifest), _converted(manifest, "vision")))
    held, kept = Part(WEIGHTS, tower), Part(COPIES, tower)
    prefill = Part(PREFILL, _beyond(manifest, use, tower))
    pictures = [picture_parts(manifest, use, stage) for stage in ("picture", "vision", "project")]
    return (
        Stage("open", (*mapped, making, trying)),
        Stage("picture", (*mapped, pictures[0])),
        Stage("vision", (*mapped, pictures[1], held, Part(VISION, _tower_rows(manifest)))),
        Stage("project", (*mapped, pictures[2], kept, Part(VISION, max(0.0, joiner + _hidden_rows(manifest) - tower)))),
        Stage("prefill", (*mapped, kept, prefill, _first_cache(manifest))),
        Stage("words", (*mapped, kept, _cache(manifest, use.used, tower))),
    )


def packed(manifest: Manifest, component: str) -> float:
    """Bytes of a component's matrices as they are held; the embedding table stays in its mapped file."""
    return sum(_held(kind, size, component) for kind, size in _types(manifest, component).items())


def _held(kind: str, size: float, component: str) -> float:
    """Bytes of `size` stored bytes of one type, once prepacked.

    Half precision is converted to float32. MatMulNBits holds scales as float32 three times (the converted input, the
    packed scales, the scales times the sums of each block), beside its integers. Eight-bit matrices and float32 only
    change their order.
    """
    if kind == "f16":
        return 2 * size * (_HEAP if component != "decoder" else 1)
    block = _block(kind)
    if not block:
        return size
    bits, length = block
    return _weights(kind, size) * (bits / 8 + 3 * _SCALE / length)


def _weights(kind: str, size: float) -> float:
    """How many weights take `size` bytes; blocks have a half precision scale, and a zero point if of 4 bits."""
    block = _block(kind)
    if not block:
        return size / {"f16": 2, "f32": 4}.get(kind, 1)
    bits, length = block
    return size / (bits / 8 + 2 / length + (bits / 8 / length if bits == 4 else 0))


def _block(kind: str) -> tuple[int, int] | None:
    """Bits and length of a block, as "uint4_32" or "int8_32" says them."""
    name, _, length = kind.partition("_")
    return (int("".join(filter(str.isdigit, name))), int(length)) if length.isdigit() else None


def _types(manifest: Manifest, component: str) -> dict[str, float]:
    """Stored bytes of a component by type; the decoder's without its embedding table.

    The table is of the type that would take its file's bytes.
    """
    types: dict[str, float] = dict(next(c.types for c in manifest.components if c.name == component))
    if component == "decoder" and types:
        table = role_bytes(manifest, "onnx/embed_tokens.onnx_data")
        count = manifest.model.decoder.vocab * manifest.model.decoder.width
        nearest = min(types, key=lambda kind: abs(_weights(kind, table) - count))
        types[nearest] = max(0.0, types[nearest] - table)
    return types


def _making(manifest: Manifest, decoder: float) -> float:
    """What a first opening holds beside the mapped copies: the graph that is being copied, one after the other."""
    prefill = role_bytes(manifest, "onnx/decoder_prefill.onnx_data")
    first = decoder - prefill + _converted(manifest, "decoder") + _fused(manifest)
    return max(first - prefill, prefill)


def _converted(manifest: Manifest, component: str) -> float:
    """Half precision matrices and scales of a component as float32, beside their packed copies."""
    types = _types(manifest, component)
    blocks = {kind: block for kind in types if (block := _block(kind))}
    scales = sum(_SCALE * _weights(kind, types[kind]) / length for kind, (_, length) in blocks.items())
    return scales + 2 * types.get("f16", 0.0)


def _fused(manifest: Manifest) -> float:
    """What is left of making MatMulNBits out of the portable flavour's operators: 4-bit integers in the other order.

    They are freed, but as blocks below 32 MB, which the allocator keeps for what is opened next.
    """
    if manifest.flavour != "portable":
        return 0.0
    types = _types(manifest, "decoder")
    return sum(_weights(kind, size) / 2 for kind, size in types.items() if (_block(kind) or (0,))[0] == 4)


def _reading(manifest: Manifest) -> float:
    """The largest matrix on its way from the file into its layout, twice; in float32 where it is stored as floats."""
    integers = any(kind not in ("f16", "f32") for kind in _types(manifest, "decoder"))
    return 2.0 * (1 if integers else 4) * largest_matrix(manifest)


def _cache(manifest: Manifest, positions: int, free: float = 0.0) -> Part:
    """Keys and values: pages are taken as they are written.

    In the portable flavour a call has the past beside the present. Both are blocks of a few MB, which take what is
    `free` before they take more: the rows of the prefill in its arena, or what the allocator kept of the tower.
    """
    size = float(manifest.memory.kv_per_position * positions)
    return Part(KV, size + (max(0.0, size - free) if manifest.flavour == "portable" else 0.0))


def _first_cache(manifest: Manifest) -> Part:
    """A picture's keys and values, before which there is no past."""
    return Part(KV, float(manifest.memory.kv_per_position * prefill_positions(manifest)))


def _tower_rows(manifest: Manifest) -> float:
    """One crop in the tower, float32: scores [heads, tokens, tokens] beside 7 rows, or the MLP's rows twice."""
    vision = manifest.model.vision
    n, width = vision.tokens, vision.width
    return 4.0 * n * max(vision.heads * n + 7 * width, 2 * vision.mlp_width + 3 * width)


def _hidden_rows(manifest: Manifest) -> float:
    """The projector's hidden rows as float32 three times (product, bias, activation), in 8 bits; input, output."""
    model = manifest.model
    return model.vision.tokens * (13.0 * model.projector.hidden + 8 * model.vision.width + 4 * model.decoder.width)


def _prefill(manifest: Manifest, use: Use) -> float:
    """A picture's positions at once, float32: scores, the MLP's rows three times, twelve rows, four masks."""
    return _scores(manifest, use) + _rows(manifest, use)


def _scores(manifest: Manifest, use: Use) -> float:
    n = min(prefill_positions(manifest), use.context)
    return 4.0 * manifest.model.decoder.heads * n * n


def _rows(manifest: Manifest, use: Use) -> float:
    decoder, n = manifest.model.decoder, min(prefill_positions(manifest), use.context)
    mlp = decoder.mlp_width * (4 if decoder.gated else 3)
    return 4.0 * n * (mlp + 12 * decoder.width + 4 * n)


def _beyond(manifest: Manifest, use: Use, kept: float) -> float:
    """A prefill where freed memory can be used again: the scores are too large a block for it, rows are not."""
    return _scores(manifest, use) + max(0.0, _rows(manifest, use) - kept)
