"""What a machine makes of the self-test, held against the vectors: exact where bytes are, else within their limits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple
from itertools import zip_longest
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from vlmedge.answer import Box, Point
from vlmedge.parity.metrics import centred
from vlmedge.parity.outcomes import judged_facts, judged_numbers
from vlmedge.parity.report import StageResult
from vlmedge.parity.selftest_file import FoundVector, ModelVectors, PictureVector, ReadingVector, Sample, Vectors
from vlmedge.parity.trace import Trace, caption_ids
from vlmedge.parity.vectors import bins_of, picture_vector
from vlmedge.prompt import Tokenizer
from vlmedge.session import F32
from vlmedge.spec import ModelSpec

F64: TypeAlias = npt.NDArray[np.float64]
WITH_MODEL = ("features", "projected", "logits", "tokens", "regions", "boxes")
_DIGITS = 1e-5  # of boxes made of equal bins; vectors keep six


def names(spec: ModelSpec) -> tuple[str, ...]:
    """The checks that need the model; one without region heads has fewer."""
    return WITH_MODEL if spec.region is not None else WITH_MODEL[:-2]


def without_model(vectors: Vectors, spec: ModelSpec, tokenizer: Tokenizer) -> Iterator[StageResult]:
    """Token ids, crops and the normalised tensor: equal to the last bit on every machine."""
    texts = [(v.text, v.ids, tuple(tokenizer.encode(v.text))) for v in vectors.text]
    wrong = [f"{text[:40]!r} becomes {_few(ours)} instead of {_few(ids)}" for text, ids, ours in texts if ids != ours]
    for v in vectors.decoded:
        found = tokenizer.decode(v.ids)
        if found != v.text:
            wrong.append(f"{_few(v.ids)} becomes {found[:40]!r} instead of {v.text[:40]!r}")
    if vectors.model is not None and vectors.model.prompt_ids != caption_ids(spec.prompt)[1]:
        wrong.append("the manifest's template of a caption is not the one that was recorded")
    yield judged_facts("tokenizer", wrong, {"texts": len(vectors.text)})
    pairs = [(i, v, picture_vector(v.height, v.width, spec.image)) for i, v in enumerate(vectors.pictures)]
    wrong = [f"picture {i}: {what}" for i, a, b in pairs if (what := _parted(a, b))]
    yield judged_facts("preprocess", wrong, {"pictures": len(pairs)})
    wrong = [f"picture {i}: the tensor has another hash" for i, a, b in pairs if a.tensor_sha256 != b.tensor_sha256]
    yield judged_facts("pixels", wrong, {"pictures": len(pairs)})


def with_model(
    vectors: Vectors, model: ModelVectors, found: Trace, rows: Sequence[Sequence[F32]], spec: ModelSpec
) -> Iterator[StageResult]:
    """Samples of every stage, then the choices: tokens and bins.

    `rows`: for each reading the logits float32 [vocab] behind which each recorded token stands, those before it fed.
    """
    limits, ours = vectors.limits, (found.small, found.stitched)
    readings = list(zip((model.small, model.stitched), ours, strict=True))
    tie = vectors.noise * (limits.get("logits") or 0.0)
    crops = [(model.features.output, found.features), (model.local_features.output, found.local)]
    yield _near("features", limits, crops)
    yield _near("projected", limits, [(a.projected, b.projected) for a, b in readings])
    yield _near("logits", limits, [(a.logits, centred(b.logits)) for a, b in readings])
    answers = list(zip((model.small, model.stitched), rows, strict=True))
    yield _tokens(limits.get("logits"), tie, spec.prompt.banned, answers)
    if model.found is not None:
        pairs = [(call.output, found.regions.get(name)) for name, call in model.regions.items()]
        yield _near("regions", limits, pairs)
        yield _boxes(limits.get("logits"), tie, model.found, found)


def _choices(rows: Sequence[F32], banned: Sequence[int]) -> list[int]:
    """The greedy token of each row of logits; bans hold from an answer's second token on."""
    out = []
    for i, row in enumerate(rows):
        allowed = row.copy()
        if i and banned:
            allowed[list(banned)] = -np.inf
        out.append(int(allowed.argmax()))
    return out


def _few(ids: Sequence[int]) -> str:
    return f"[{', '.join(map(str, ids[:8]))}{', ...' if len(ids) > 8 else ''}]"


def _parted(wanted: PictureVector, ours: PictureVector) -> str:
    """What differs first between two preprocessings of one picture; "" where nothing does."""
    if wanted.rgb_sha256 != ours.rgb_sha256:
        return "the picture itself has another hash"
    if wanted.tiling != ours.tiling:
        return f"its tiling is {ours.tiling} instead of {wanted.tiling}"
    crops = enumerate(zip_longest(wanted.crops_sha256, ours.crops_sha256))
    return next((f"crop {i} has another hash" for i, (a, b) in crops if a != b), "")


def _near(check: str, limits: dict[str, float | None], pairs: Iterable[tuple[Sample, F32 | None]]) -> StageResult:
    """The worst of all samples."""
    return judged_numbers(
        check, None, limits.get(check), *max((_difference(a, b) for a, b in pairs), default=(0.0, 0.0))
    )


def _difference(wanted: Sample, ours: F32 | None) -> tuple[float, float]:
    """`_relative` at the samples; infinite where nothing can be compared."""
    if ours is None or wanted.shape != ours.shape or not all(0 <= i < ours.size for i in wanted.at):
        return float("inf"), float("inf")
    return _relative(ours.ravel()[list(wanted.at)], wanted.values, wanted.rms)


def _relative(ours: F32, wanted: Sequence[float], rms: float) -> tuple[float, float]:
    """RMS of the difference over the recorded RMS, and the largest difference.

    Over the samples' own RMS where that is larger: the best logits are far from the others, and so are their errors.
    """
    if len(ours) != len(wanted) or not np.isfinite(ours).all():
        return float("inf"), float("inf")
    given = np.array(wanted, np.float64)
    delta, scale = np.abs(ours - given), max(rms, _rms(given)) or 1.0
    return _rms(delta) / scale, float(delta.max(initial=0.0))


def _rms(values: F64) -> float:
    return float(np.sqrt(np.mean(values**2))) if len(values) else 0.0


def _tokens(
    limit: float | None, tie: float, banned: Sequence[int], readings: Iterable[tuple[ReadingVector, Sequence[F32]]]
) -> StageResult:
    """What would be chosen after each of the recorded tokens, and the logits of those."""
    worst, numbers, ambiguous, parting = (0.0, 0.0), {"tokens": 0.0, "equal": 0.0}, 0, ""
    for wanted, rows in readings:
        worst = max(worst, _chosen(wanted.tokens, wanted.values, rows, None, wanted.logits.rms))
        ours = _choices(rows, banned)
        parted = [i for i, (a, b) in enumerate(zip_longest(wanted.tokens, ours)) if a != b]
        what = f"{wanted.input.partition(' in ')[0]}: token"
        faults = [_choice(f"{what} {i}", i, wanted.tokens, ours, wanted.margins, tie) for i in parted]
        numbers["tokens"] += len(wanted.tokens)
        numbers["equal"] += len(wanted.tokens) - len(parted)
        ambiguous += faults.count("")
        parting = parting or next(filter(None, faults), "")
        if parted:
            numbers["first_divergence"] = min(parted[0], numbers.get("first_divergence", parted[0]))
    return judged_numbers("tokens", None, limit, *worst, numbers, ambiguous, parting if limit is not None else "")


def _boxes(limit: float | None, tie: float, wanted: FoundVector, found: Trace) -> StageResult:
    """Bins as tokens; where none differs, the boxes and points that are made of them too."""
    outputs, judged = bins_of(found), limit is not None
    bins = [int(row.argmax()) for row in outputs]
    at = _first_other(wanted.bins, bins)
    worst = _chosen(wanted.bins, wanted.values, outputs, at, 0.0)
    numbers: dict[str, float] = {"bins": len(wanted.bins), "equal": len(wanted.bins) if at is None else at}
    if at is not None:
        parting = _choice(f"bin {at}", at, wanted.bins, bins, wanted.margins, tie)
        return judged_numbers("boxes", None, limit, *worst, numbers, int(not parting), parting if judged else "")
    ours = [thing for things in found.found.values() for thing in things]
    apart = _farthest((*wanted.boxes, *wanted.points), ours)
    parting = "equal bins make other boxes" if judged and apart > _DIGITS else ""
    return judged_numbers("boxes", None, limit, *worst, numbers, 0, parting)


def _chosen(
    wanted: Sequence[int], values: Sequence[float], rows: Sequence[F32], at: int | None, rms: float
) -> tuple[float, float]:
    """`_relative` of the recorded choices, up to and with choice `at`: what follows that is another answer."""
    count = len(wanted) if at is None else min(at + 1, len(wanted), len(rows))
    found = [row.take(i, mode="clip") for row, i in zip(rows, wanted[:count], strict=False)]
    return _relative(np.array(found, np.float32), values[:count], rms)


def _first_other(wanted: Sequence[int], ours: Sequence[int]) -> int | None:
    """Index of the first choice that differs; None where all are equal."""
    return next((i for i, (a, b) in enumerate(zip_longest(wanted, ours)) if a != b), None)


def _choice(
    what: str, at: int, wanted: Sequence[int], ours: Sequence[int], margins: Sequence[float], tie: float
) -> str:
    """Why a choice that differs is a fault; "" where it was a near tie."""
    if at >= min(len(wanted), len(ours), len(margins)):
        return f"there are {len(ours)} choices instead of {len(wanted)}"
    if margins[at] <= tie:
        return ""
    return (
        f"{what} is {ours[at]} instead of {wanted[at]}, which won by {margins[at]:.2g} RMS: more than a near tie's "
        f"{tie:.2g}"
    )


def _farthest(wanted: Sequence[Box | Point], ours: Sequence[Box | Point]) -> float:
    """The largest difference of a coordinate; infinite where there are other things."""
    if [type(thing) for thing in wanted] != [type(thing) for thing in ours]:
        return float("inf")
    pairs = [(astuple(a), astuple(b)) for a, b in zip(wanted, ours, strict=True)]
    return max((abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True)), default=0.0)
