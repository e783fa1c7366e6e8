"""Which part of a model pays for quantization: the original with one part's stored weights put in its place.

No export is needed for it: the bundle's own weights are read back, so what is measured is what ships, in any format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from vlmedge.exporters import Readback
from vlmedge.loading import Described
from vlmedge.parity.compare import box_overlaps
from vlmedge.parity.judge import Judgement, judge
from vlmedge.parity.metrics import kl_divergence, pooled
from vlmedge.parity.record import Record
from vlmedge.parity.report import PartResult
from vlmedge.progress import Progress
from vlmedge.session import F32
from vlmedge.spec import RegionSpec
from vlmedge.tensors import Tensor

# Part -> what the names of its tensors begin with; the first that fits.
PARTS = {
    "vision": "vision.",
    "projector": "projector.",
    "embeddings": "decoder.embed.",
    "head": "decoder.head.",
    "decoder": "decoder.",
    "region": "region.",
}
ALL, RUNTIME = "all", "runtime"
_BYTES = {"f32": 4, "f16": 2, "bf16": 2}


def part_of(name: str) -> str:
    """The part that a canonical tensor belongs to."""
    return next(part for part, start in PARTS.items() if name.startswith(start))


def mixtures(original: Mapping[str, Tensor], stored: Readback) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Each part's name with the original's tensors but for that part, whose stored ones they are; then all stored."""
    for part in PARTS:
        own = {name: tensor for name, tensor in stored.tensors.items() if part_of(name) == part}
        if own:
            yield part, {**original, **own}
    yield ALL, {**original, **stored.tensors}


def attribute(
    record: Record,
    original: Described,
    stored: Readback,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[PartResult]:
    """Measure every part against the original, on the tokens of a record: one pass over the weights for each."""
    progress, spec = progress or Progress(), original.spec
    found: list[PartResult] = []
    progress.stage("the original")
    base = judge(record, spec, original.tensors, same_inputs=False, threads=threads)
    for part, tensors in mixtures(original.tensors, stored):
        progress.stage(f"the original with {'every stored weight' if part == ALL else f'the stored {part}'}")
        judged = judge(record, spec, tensors, same_inputs=False, threads=threads)
        found.append(_result(part, original, stored, record, base, judged.logits, judged.heads))
    logits, heads = (f.logits for f in record.forwards), (h.outputs for h in record.heads)
    found.append(_result(RUNTIME, original, stored, record, base, tuple(logits), tuple(heads)))
    return found


def _result(
    part: str,
    original: Described,
    stored: Readback,
    record: Record,
    base: Judgement,
    logits: tuple[F32, ...],
    heads: tuple[F32, ...],
) -> PartResult:
    spec = original.spec
    names = [name for name in spec.tensors() if part in (ALL, RUNTIME) or part_of(name) == part]
    sizes = [original.tensors[name].size for name in names]
    held = sum(_BYTES[original.tensors[name].dtype] * size for name, size in zip(names, sizes, strict=True))
    bytes_ = sum(size for name, size in stored.bytes.items() if name.partition("#")[0] in names)
    pairs = [(a, b) for f, a, b in zip(record.forwards, logits, base.logits, strict=True) if f.chooses]
    divergences = np.array([kl_divergence(theirs, ours) for ours, theirs in pairs])
    overlaps = _overlaps(record, heads, base, spec.region) if spec.region else []
    return PartResult(
        part,
        sum(sizes),
        bytes_,
        held - bytes_,
        len(pairs),
        float(divergences.mean()),
        float(np.percentile(divergences, 99)),
        float(np.mean([ours.argmax() == theirs.argmax() for ours, theirs in pairs])),
        pooled(pairs)[0],
        float(np.mean(overlaps)) if overlaps else None,
    )


def _overlaps(record: Record, heads: tuple[F32, ...], base: Judgement, spec: RegionSpec) -> list[float]:
    """Boxes of these heads' outputs beside the original's."""
    read = [
        (replace(head, outputs=ours), theirs)
        for head, ours, theirs in zip(record.heads, heads, base.heads, strict=True)
        if head.read is not None and head.name.endswith("decoder")
    ]
    return box_overlaps(read, spec)
