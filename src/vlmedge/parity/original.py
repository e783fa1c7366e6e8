"""The original's side of a comparison: what it makes of the same inputs, and of the tokens that the export chose.

It is read layer by layer (`reference.streamed`), every passage at once; the export's greedy tokens are given to it
(teacher forcing), so one pass tells where it would have chosen otherwise, and by how much.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vlmedge import imaging
from vlmedge.parity import pictures
from vlmedge.parity.trace import Reading, Trace, caption_ids
from vlmedge.session import F32
from vlmedge.spec import ModelSpec
from vlmedge.tensors import Tensor


@dataclass(frozen=True, slots=True)
class Judgement:
    """The original on one reading.

    `choices`: its best token at each of the export's tokens, `gaps`: by how much it was the best.
    """

    projected: F32
    logits: F32
    choices: tuple[int, ...]
    gaps: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Original:
    """The original's stages, beside those of `Trace`."""

    features: F32
    local: F32
    small: Judgement
    stitched: Judgement
    regions: dict[str, F32]


def judge(spec: ModelSpec, tensors: Mapping[str, Tensor], ours: Trace, threads: int | None = None) -> Original:
    """Run the original over the inputs of a trace and over its tokens. Needs PyTorch."""
    from vlmedge.reference.streamed import Passage, StreamedReference

    model = StreamedReference(spec, tensors, threads)
    small, large = (imaging.crop(pictures.pattern(*size), spec.image) for size in pictures.sizes(spec.image))
    pixels = imaging.normalise(np.stack([small.pixels[0], large.pixels[1]]), spec.image)
    features = model.vision(pixels)
    made = pictures.features(large.count, spec.vision.tokens, spec.vision.width)
    whole = np.repeat(features[:1], small.count, axis=0)
    projected = model.project([(whole, small.tiling), (made, large.tiling)])
    start, prompt = caption_ids(spec.prompt)
    passages = []
    for rows, reading in zip(projected, (ours.small, ours.stitched), strict=True):
        fed = model.embed(np.array([start, *prompt, *reading.tokens[:-1]], np.int32))
        embeddings = np.concatenate([fed[:1], rows, fed[1:]])
        prefix = 1 + len(rows) if spec.decoder.bidirectional_prefix else 0
        first = len(rows) + len(prompt)  # position of the last prompt token
        passages.append(Passage(embeddings, prefix, tuple(range(first, len(embeddings)))))
    logits = model.logits(passages)
    small_one, stitched = (
        _judgement(rows, found, reading, spec.prompt.banned)
        for rows, found, reading in zip(projected, logits, (ours.small, ours.stitched), strict=True)
    )
    regions = model.region(pictures.region_inputs(spec.decoder.width)) if spec.region else {}
    return Original(features[:1], features[1:], small_one, stitched, regions)


def _judgement(projected: F32, logits: F32, reading: Reading, banned: tuple[int, ...]) -> Judgement:
    first = logits[0].copy()
    logits[1:, list(banned)] = -np.inf
    order = np.partition(logits, -2, axis=-1)[:, -2:]
    choices = tuple(int(i) for i in logits.argmax(axis=-1))
    assert len(choices) == len(reading.tokens)
    return Judgement(projected, first, choices, tuple(float(g) for g in order[:, 1] - order[:, 0]))
