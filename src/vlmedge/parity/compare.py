"""An export's calls beside the reference's, stage by stage: how far apart, and where the models part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vlmedge.answer import Box
from vlmedge.limits import Against, Limits
from vlmedge.parity.bins import misread
from vlmedge.parity.judge import Judgement
from vlmedge.parity.metrics import centred, difference, kl_divergence, largest, margin, near_tie, pooled
from vlmedge.parity.outcomes import judged_numbers
from vlmedge.parity.record import Forward, Head, Record
from vlmedge.parity.report import StageResult, TokenResult
from vlmedge.regions import coordinate_of, size_of
from vlmedge.scoring import iou
from vlmedge.session import F32
from vlmedge.spec import ModelSpec, RegionSpec

_Pairs = list[tuple[F32, F32]]
# One call may be off by this many times what all calls together may: attention that is nearly undecided turns over for
# a small error, so that single calls are off by ten times the usual (benchmarks/gate.py).
SINGLE = 4.0
# Where more than this is allowed, quantization itself turns choices: they are counted and not judged.
CHOICES_UP_TO = 0.25


@dataclass(frozen=True, slots=True)
class Comparison:
    """The stages of one comparison, and every position at which a token was chosen."""

    stages: tuple[StageResult, ...]
    tokens: tuple[TokenResult, ...]


def compare(record: Record, judged: Judgement, spec: ModelSpec, against: Against, limits: Limits | None) -> Comparison:
    """Compare what an export did with what the reference did; without limits everything is measured only."""
    limits = limits or Limits(against, "")
    forwards = [(f, theirs) for f, theirs in zip(record.forwards, judged.logits, strict=True)]
    steps = [(f, theirs) for f, theirs in forwards if f.decodes]
    heads = list(zip(record.heads, judged.heads, strict=True))
    tokens = tuple(_tokens(forwards, spec.prompt.banned, limits.logits))
    stages = [
        _stage("features", against, limits.features, _beside(record.vision, judged.features, "features")),
        _stage("projected", against, limits.projected, _projected(record, judged, against)),
        _pooled("logits", against, limits.logits, [_centred((f.logits, b) for f, b in forwards if not f.decodes)]),
        _token_stage(against, limits.logits, _centred((f.logits, b) for f, b in steps if f.chooses), tokens),
    ]
    if spec.region is not None:
        stages.append(_stage("regions", against, limits.regions, [(h.outputs, b) for h, b in heads if h.read is None]))
        fed = [(f.logits, theirs) for f, theirs in steps if not f.chooses]
        stages.append(_box_stage(against, limits.logits, heads, fed, spec.region))
    return Comparison(tuple(stages), tokens)


def _beside(calls: Iterable[object], judged: Sequence[F32], name: str) -> _Pairs:
    return [(getattr(call, name), wanted) for call, wanted in zip(calls, judged, strict=True)]


def _projected(record: Record, judged: Judgement, against: Against) -> _Pairs:
    """What the decoder is fed. A table of few bits is far from the original's rows, which `weights` judges better."""
    rows = _beside(record.projections, judged.projected, "rows")
    return rows + _beside(record.embeddings, judged.embedded, "rows") if against == "stored" else rows


def _stage(stage: str, against: Against, limit: float | None, pairs: _Pairs) -> StageResult:
    """The worst of all pairs."""
    if not pairs:
        return _nothing(stage, against)
    return judged_numbers(stage, against, limit, *max(difference(a, b) for a, b in pairs))


def _pooled(
    stage: str,
    against: Against,
    limit: float | None,
    groups: Sequence[_Pairs],
    numbers: dict[str, float] | None = None,
    ambiguous: int = 0,
    parting: str = "",
) -> StageResult:
    """All pairs of a group as one array: where logits are small, an error as large as elsewhere is no larger a fault.

    Groups are of different scales; the worse one counts.
    """
    groups = [pairs for pairs in groups if pairs]
    if not groups:
        return _nothing(stage, against)
    relative, most = (max(column) for column in zip(*(pooled(pairs) for pairs in groups), strict=True))
    worst = max(largest(pairs) for pairs in groups) if np.isfinite(relative) else 0.0
    most_of_one = _most_of_one(against, limit)
    if worst > most_of_one:
        parting = f"relative RMS {worst:.1e} in a single call, at most {most_of_one:.1e} is allowed"
    return judged_numbers(
        stage, against, limit, relative, most, {**(numbers or {}), "worst": worst}, ambiguous, parting
    )


def _nothing(stage: str, against: Against) -> StageResult:
    return StageResult(stage, against, "skipped", why="nothing of this kind was asked")


def _centred(pairs: Iterable[tuple[F32, F32]]) -> _Pairs:
    return [(centred(ours), centred(theirs)) for ours, theirs in pairs]


def _most_of_one(against: Against, limit: float | None) -> float:
    """What one call may be off; an error as large as the reference itself has nothing to do with it any more."""
    if limit is None:
        return np.inf
    return SINGLE * limit if against == "original" else min(SINGLE * limit, 1.0)


def _tokens(
    forwards: Sequence[tuple[Forward, F32]], banned: Sequence[int], limit: float | None
) -> Iterator[TokenResult]:
    """One result for every token that was chosen, counted from each prompt on; bans hold from the second one on."""
    counts: dict[str, int] = {}
    for forward, wanted in forwards:
        if not forward.chooses or not np.isfinite(forward.logits).all() or forward.logits.shape != wanted.shape:
            continue
        ours, theirs = forward.logits.copy(), wanted.copy()
        if forward.decodes and banned:
            ours[list(banned)] = theirs[list(banned)] = -np.inf
        chosen, best = int(ours.argmax()), int(theirs.argmax())
        index = counts[forward.reading] = counts.get(forward.reading, -1) + 1 if forward.decodes else 0
        tie = chosen != best and _choices_judged(limit) and near_tie(theirs, chosen, _noise(ours, theirs, limit))
        gap = margin(theirs, chosen) if chosen != best else _second(theirs)
        kl = kl_divergence(wanted, forward.logits)
        yield TokenResult(forward.reading, index, chosen, best, kl, gap, tie)


def _noise(ours: F32, theirs: F32, limit: float | None) -> float:
    """The relative RMS that can explain a choice: what is allowed, or this row's own within what one row may be off."""
    known, allowed = np.isfinite(theirs), min(limit or 0.0, CHOICES_UP_TO)  # bans are minus infinity
    own = difference(centred(ours[known]), centred(theirs[known]))[0]
    return min(max(allowed, own), SINGLE * allowed)


def _choices_judged(limit: float | None) -> bool:
    """Near ties are what noise turns; where quantization does, a choice is another one and no fault."""
    return limit is not None and limit <= CHOICES_UP_TO


def _second(values: F32) -> float:
    """By how much the best beats the second."""
    two = np.partition(values, -2)[-2:]
    return float(two[1] - two[0])


def _token_stage(against: Against, limit: float | None, pairs: _Pairs, tokens: Sequence[TokenResult]) -> StageResult:
    parted = [t for t in tokens if t.token != t.reference_token]
    other = [t for t in parted if not t.ambiguous]
    wrong = other if _choices_judged(limit) else []
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
    return _pooled("tokens", against, limit, [pairs], numbers, len(parted) - len(other), parting)


def _box_stage(
    against: Against,
    limit: float | None,
    heads: Sequence[tuple[Head, F32]],
    fed: Sequence[tuple[F32, F32]],
    spec: RegionSpec,
) -> StageResult:
    """Bins of coordinates and sizes, what is fed back for them, and the boxes that they make.

    `fed`: logits after what was fed back; after the last number of a box they say whether there is another one.
    """
    read = [(h, wanted) for h, wanted in heads if h.read is not None]
    bins = [choice for h, wanted in read for choice in _bins(h, wanted)]
    choices = bins + [(a, b) for a, b in fed if a.shape == b.shape and np.isfinite(a).all()]
    parted = [(ours, theirs) for ours, theirs in choices if ours.argmax() != theirs.argmax()]
    judged = _choices_judged(limit)
    other = [p for p in parted if not (judged and near_tie(p[1], int(p[0].argmax()), _noise(*p, limit)))]
    wrong = other if judged else []
    overlaps = box_overlaps(read, spec)
    numbers: dict[str, float] = {"choices": len(choices), "equal": len(choices) - len(parted)}
    if overlaps:
        numbers |= {"iou": float(np.mean(overlaps)), "iou_least": min(overlaps)}
    parting = ""
    if wrong:
        ours, theirs = wrong[0]
        what = "a bin" if any(ours is row for row, _ in bins) else "the token that ends or goes on"
        parting = f"{what} is {ours.argmax()} instead of {theirs.argmax()}, and not for a near tie"
    parting = misread([head for head, _ in heads], spec) or parting
    groups = [_centred((h.outputs, wanted) for h, wanted in read), _centred(fed)]
    return _pooled("boxes", against, limit, groups, numbers, len(parted) - len(other), parting)


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
