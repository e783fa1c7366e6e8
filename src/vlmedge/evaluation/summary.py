"""From answered questions to scores: each model's, by kind of question, and each model's against the first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from vlmedge.evaluation.row import Row
from vlmedge.evaluation.statistics import Estimate, Sums, difference, estimate, mcnemar
from vlmedge.subject import Subject

SCHEMA = "vlmedge.evaluation/1"
CHANCE = 0.05  # a p-value from which on a split of the flips may be chance

# Of a row: what it adds to a metric, and what it is divided by; None where it does not take part.
Part = Callable[[Row], tuple[float, float] | None]


def _score(name: str) -> Part:
    def part(row: Row) -> tuple[float, float] | None:
        value = getattr(row, name)
        return None if value is None else (value, 1.0)

    return part


def _found(skill: str, name: str) -> Part:
    return lambda row: (getattr(row, name), row.things) if row.skill == skill and row.right is not None else None


def _count_right(row: Row) -> tuple[float, float] | None:
    return (float(row.right), 1.0) if row.skill in ("detect", "point") and row.right is not None else None


def _right(row: Row) -> tuple[float, float] | None:
    return None if row.right is None else (float(row.right), 1.0)


METRICS: dict[str, Part] = {
    "right": _right,
    "exact": _score("exact"),
    "soft": _score("soft"),
    "anls": _score("anls"),
    "mean_iou": _found("detect", "overlap"),
    "box_hits": _found("detect", "hits"),
    "point_hits": _found("point", "hits"),
    "all_found": _count_right,
}
_SHARES = frozenset(("right", "exact", "box_hits", "point_hits", "all_found"))


@dataclass(frozen=True, slots=True)
class Score:
    """One model's scores, each in 0..1; a metric that nothing was asked for is absent.

    `right`: of all questions. `exact`, `soft`, `anls`: of texts. `mean_iou`, `box_hits`, `point_hits`: over the things
    to find. `all_found`: of the detect and point questions, those where as many were found as there are, each where it
    is. `kinds`: `right` by kind. `unasked`: questions that the model has no skill for; `failed`: those that did not
    fit its context, counted as wrong. `ms`: the median time of one answer, `seconds` of all of them.
    """

    subject: Subject
    original: bool
    answered: int
    metrics: dict[str, Estimate]
    kinds: dict[str, Estimate]
    unasked: int
    failed: int
    ms: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Pair:
    """A model beside the base, over the questions that both answered.

    `differences`: its metrics minus the base's. `lost`: questions that the base has right and it has wrong, `won` the
    reverse, `p` how likely so uneven a split is by chance (`statistics.mcnemar`). `same`: the share of equal answers.
    """

    label: str
    base: str
    questions: int
    differences: dict[str, Estimate]
    lost: int
    won: int
    p: float
    same: float

    @property
    def verdict(self) -> str:
        """In words: a difference has an interval of `right` without 0 and a `p` under 0.05, else none is claimed.

        Either alone would: of two pictures that lost a question each every draw is alike, and p knows no pictures.
        """
        found = self.differences.get("right")
        if found is None:
            return "no question was answered by both"
        if not self.lost and not self.won:
            return "the same questions are right"
        if found.low is None:
            return "one picture tells nothing"
        if found.includes_zero:
            return "no clear difference (the interval includes 0)"
        if self.p >= CHANCE:
            return f"no clear difference (p is {self.p:.2g})"
        return "better" if found.value > 0 else "worse"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What came of an evaluation. `questions`: how many were asked of each model; `folder` holds every answer."""

    data: str
    data_digest: str
    pictures: int
    questions: int
    folder: str
    scores: tuple[Score, ...]
    pairs: tuple[Pair, ...]

    @property
    def complete(self) -> bool:
        """Has every model answered every question? Shards leave some to others."""
        return all(score.answered == self.questions for score in self.scores)

    def as_dict(self) -> dict[str, Any]:
        """The JSON of `vlmedge eval --json`."""
        data = {"schema": SCHEMA, **asdict(self), "complete": self.complete}
        for entry, pair in zip(data["pairs"], self.pairs, strict=True):
            entry["verdict"] = pair.verdict
        return data


def score(subject: Subject, rows: Sequence[Row], *, original: bool = False) -> Score:
    """Sum up one model's answers."""
    metrics = {name: estimate(_sums(rows, part), share=name in _SHARES) for name, part in METRICS.items()}
    by_kind: dict[str, list[Row]] = {}
    for row in rows:
        by_kind.setdefault(row.kind, []).append(row)
    kinds = {kind: estimate(_sums(by_kind[kind], _right), share=True) for kind in sorted(by_kind)}
    unasked = sum(row.right is None for row in rows)
    failed = sum(bool(row.problem) for row in rows) - unasked
    times = [row.ms for row in rows if not row.problem]
    middle = median(times) if times else 0.0
    return Score(
        subject, original, len(rows), _present(metrics), _present(kinds), unasked, failed, middle, sum(times) / 1000
    )


def pair(label: str, rows: Mapping[str, Row], base: str, base_rows: Mapping[str, Row]) -> Pair:
    """Compare a model with the base; both are rows by question id."""
    both = [(rows[i], base_rows[i]) for i in base_rows if i in rows]
    both = [(ours, theirs) for ours, theirs in both if ours.right is not None and theirs.right is not None]
    ours, theirs = [one for one, _ in both], [other for _, other in both]
    differences = {name: difference(_sums(ours, part), _sums(theirs, part)) for name, part in METRICS.items()}
    lost = sum(bool(other.right) and not one.right for one, other in both)
    won = sum(bool(one.right) and not other.right for one, other in both)
    same = sum((a.text, a.boxes, a.points) == (b.text, b.boxes, b.points) for a, b in both) / max(1, len(both))
    return Pair(label, base, len(both), _present(differences), lost, won, mcnemar(lost, won), same)


def _sums(rows: Iterable[Row], part: Part) -> Sums:
    """By picture: the sums of numerator and denominator."""
    sums: dict[str, tuple[float, float]] = {}
    for row in rows:
        added = part(row)
        if added is not None:
            total, count = sums.get(row.picture, (0.0, 0.0))
            sums[row.picture] = (total + added[0], count + added[1])
    return sums


def _present(found: Mapping[str, Estimate | None]) -> dict[str, Estimate]:
    return {name: value for name, value in found.items() if value is not None}
