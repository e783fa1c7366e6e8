"""An export's calls beside the reference's, stage by stage: how far apart, and where the models part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vlmedge.answer import Box
from vlmedge.limits import Against, Limits
from vlmedge.parity.bins import misread
from vlmedge.parity.judge import Judgement
from vlmedge.parity.metrics import difference, finite, iou, kl_divergence, largest, margin, near_tie, pooled
from vlmedge.parity.record import Forward, Head, Record
from vlmedge.parity.report import Outcome, StageResult, TokenResult
from vlmedge.regions import coordinate_of, size_of
from vlmedge.session import F32
from vlmedge.spec import ModelSpec, RegionSpec

_Pairs = list[tuple[F32, F32]]
# One call may be off by this many times what all calls together may: attention that is nearly undecided turns over for
# a small error, so that single calls are off by ten times the usual (benchmarks/gate.py).
SINGLE = 4.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """The stages of one comparison, and every position at which a token was chosen."""

    stages: tuple[StageResult, ...]
    tokens: tuple[TokenResult, ...]


def compare(record: Record, judged: Judgement, spec: ModelSpec, against: Against, limits: Limits | None) -> Comparison:
    """Compare what an export did with what the reference did; without limits everything is measured only."""
    limits = limits or Limits(against, "")
    forwards = list(zip(record.forwards, judged.logits, strict=True))
    heads = list(zip(record.heads, judged.heads, strict=True))
    tokens = tuple(_tokens(forwards, spec.prompt.banned, limits.logits))
    stages = [
        _stage("features", against, limits.features, _beside(record.vision, judged.features, "features")),
        _stage("projected", against, limits.projected, _projected(record, judged, against)),
        _pooled("logits", against, limits.logits, [(f.logits, b) for f, b in forwards if not f.decodes]),
        _token_stage(against, limits.logits, [(f.logits, b) for f, b in forwards if f.decodes and f.chooses], tokens),
    ]
    if spec.region is not None:
        stages.append(_stage("regions", against, limits.regions, [(h.outputs, b) for h, b in heads if h.read is None]))
        stages.append(_box_stage(against, limits.logits, heads, spec.region))
    return Comparison(tuple(stages), tokens)


def _beside(calls: Iterable[object], judged: Sequence[F32], name: str) -> _Pairs:
    return [(getattr(call, name), wanted) for call, wanted in zip(calls, judged, strict=True)]


def _projected(record: Record, judged: Judgement, against: Against) -> _Pairs:
    """What the decoder is fed. A table of few bits is far from the original's rows, which `weights` judges better."""
    rows = _beside(record.projections, judged.projected, "rows")
    return rows + _beside(record.embeddings, judged.embedded, "rows") if against == "stored" else rows


def _stage(stage: str, against: Against, limit: float | None, pairs: _Pairs) -> StageResult:
    """The worst of all pairs."""
    return _judged(stage, against, limit, *max((difference(a, b) for a, b in pairs), default=(0.0, 0.0)))


def _pooled(
    stage: str,
    against: Against,
    limit: float | None,
    pairs: _Pairs,
    numbers: dict[str, float] | None = None,
    ambiguous: int = 0,
    parting: str = "",
) -> StageResult:
    """All pairs as one array: where logits are small, an error that is as large as elsewhere is no larger a fault."""
    relative, most = pooled(pairs) if pairs else (0.0, 0.0)
    worst = largest(pairs) if pairs and np.isfinite(relative) else 0.0
    if limit is not None and worst > SINGLE * limit:
        parting = f"relative RMS {worst:.1e} in a single call, at most {SINGLE * limit:.1e} is allowed"
    return _judged(stage, against, limit, relative, most, {**(numbers or {}), "worst": worst}, ambiguous, parting)


def _judged(
    stage: str,
    against: Against,
    limit: float | None,
    relative: float,
    most: float,
    numbers: dict[str, float] | None = None,
    ambiguous: int = 0,
    parting: str = "",
) -> StageResult:
    why = parting
    if limit is not None and relative > limit:
        why = f"relative RMS {relative:.1e}, at most {limit:.1e} is allowed"
    if not np.isfinite(relative):
        why = "numbers are not finite or of another shape"
    outcome: Outcome = "failed" if why else "measured" if limit is None else "passed"
    return StageResult(stage, against, outcome, finite(relative), finite(most), limit, numbers, ambiguous, why)


def _tokens(
    forwards: Sequence[tuple[Forward, F32]], banned: Sequence[int], limit: float | None
) -> Iterator[TokenResult]:
    """One result for every token that was chosen, counted from each prompt on; bans hold from the second one on."""
    counts: dict[str, int] = {}
    for forward, wanted in forwards:
        if not forward.chooses or not np.isfinite(forward.logits).all():
            continue
        ours, theirs = forward.logits.copy(), wanted.copy()
        if forward.decodes and banned:
            ours[list(banned)] = theirs[list(banned)] = -np.inf
        chosen, best = int(ours.argmax()), int(theirs.argmax())
        index = counts[forward.reading] = counts.get(forward.reading, -1) + 1 if forward.decodes else 0
        tie = chosen != best and near_tie(theirs, chosen, _noise(ours, theirs, limit))
        gap = margin(theirs, chosen) if chosen != best else _second(theirs)
        kl = kl_divergence(wanted, forward.logits)
        yield TokenResult(forward.reading, index, chosen, best, kl, gap, tie)


def _noise(ours: F32, theirs: F32, limit: float | None) -> float:
    """The relative RMS that can explain a choice: the limit, or this row's own, which the stage's numbers judge."""
    known = np.isfinite(theirs)  # bans are minus infinity
    return max(limit or 0.0, difference(ours[known], theirs[known])[0])


def _second(values: F32) -> float:
    """By how much the best beats the second."""
    two = np.partition(values, -2)[-2:]
    return float(two[1] - two[0])


def _token_stage(against: Against, limit: float | None, pairs: _Pairs, tokens: Sequence[TokenResult]) -> StageResult:
    parted = [t for t in tokens if t.token != t.reference_token]
    wrong = [t for t in parted if not t.ambiguous] if limit is not None else []
    numbers: dict[str, float] = {"positions": len(tokens)}
    if tokens:
        kls = np.array([t.kl for t in tokens])
        numbers["kl_mean"], numbers["kl_p99"] = float(kls.mean()), float(np.percentile(kls, 99))
        numbers["top1"] = 1 - len(parted) / len(tokens)
    if parted:
        numbers["first_divergence"] = min(t.index for t in parted)
    parting = ""
    if wrong:
        first = wrong[0]
        parting = (
            f"{first.reading}: token {first.index} is {first.token} instead of {first.reference_token}, "
            f"by a margin of {first.margin:.2g}, and not for a near tie"
        )
    return _pooled("tokens", against, limit, pairs, numbers, len(parted) - len(wrong), parting)


def _box_stage(
    against: Against, limit: float | None, heads: Sequence[tuple[Head, F32]], spec: RegionSpec
) -> StageResult:
    """Bins of coordinates and sizes, what is fed back for them, and the boxes that they make."""
    read = [(h, wanted) for h, wanted in heads if h.read is not None]
    choices = [choice for h, wanted in read for choice in _bins(h, wanted)]
    parted = [(ours, theirs) for ours, theirs in choices if ours.argmax() != theirs.argmax()]
    wrong = [p for p in parted if limit is not None and not near_tie(p[1], int(p[0].argmax()), _noise(*p, limit))]
    overlaps = box_overlaps(read, spec)
    numbers: dict[str, float] = {"bins": len(choices), "equal": len(choices) - len(parted)}
    if overlaps:
        numbers |= {"iou": float(np.mean(overlaps)), "iou_least": min(overlaps)}
    parting = ""
    if wrong:
        ours, theirs = wrong[0]
        parting = f"a bin is {ours.argmax()} instead of {theirs.argmax()}, and not for a near tie"
    parting = misread([head for head, _ in heads], spec) or parting
    pairs = [(h.outputs, wanted) for h, wanted in read]
    return _pooled("boxes", against, limit, pairs, numbers, len(parted) - len(wrong), parting)


def _bins(head: Head, wanted: F32) -> Iterator[tuple[F32, F32]]:
    """A size decoder chooses twice, a coordinate decoder once."""
    rows = 2 if head.name == "size_decoder" else 1
    if head.outputs.shape == wanted.shape and np.isfinite(head.outputs).all():
        yield from zip(head.outputs.reshape(rows, -1), wanted.reshape(rows, -1), strict=True)


def box_overlaps(read: Sequence[tuple[Head, F32]], spec: RegionSpec) -> list[float]:
    """IoU of each box of the export with the one that the reference's outputs make; points have none.

    `read`: decoder heads in the order of their calls, each with the reference's output: two coordinates, then a size.
    """
    held: list[tuple[float, float]] = []
    out = []
    for head, wanted in read:
        if head.name == "coord_decoder":
            held.append((coordinate_of(head.outputs), coordinate_of(wanted)))
        elif head.name == "size_decoder" and len(held) >= 2:
            (x, x_), (y, y_) = held[-2:]
            out.append(iou(_box(x, y, *size_of(head.outputs, spec)), _box(x_, y_, *size_of(wanted, spec))))
            held.clear()
    return out


def _box(x: float, y: float, width: float, height: float) -> Box:
    return Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
