"""The report's tables as text, for the page and for Markdown alike.

A cell may have a second line, after a line break: what is said more quietly, an interval mostly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from vlmedge.device_bench.report.rows import Row
from vlmedge.device_bench.report.stages import AFTER, PARTS, REST, STAGES
from vlmedge.device_bench.report.statistics import Figures, Ratio
from vlmedge.device_bench.report.summary import Summary
from vlmedge.device_bench.report.sustained import Curve, Sustained
from vlmedge.webpage.numbers import number, share, size
from vlmedge.webpage.svg import cut

NONE: Final = "\u2013"
_LONG = 72  # letters
Cells = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Listed:
    """A table: its columns' titles (those in `words` are text, the others numbers), its rows, `bad` ones to mark."""

    caption: str
    columns: Cells
    rows: tuple[Cells, ...]
    words: frozenset[int] = frozenset((0,))
    bad: frozenset[int] = frozenset()


def name(row: Row | Sustained, summary: Summary) -> str:
    """The label, with the device where there are several; very long ones are cut, CSV and records have them whole."""
    label = cut(row.label, _LONG)
    return label if len(summary.devices) == 1 else f"{label} ({cut(row.device, _LONG)})"


def measured(summary: Summary) -> list[Row]:
    """The rows that have numbers."""
    return [row for row in summary.rows if row.stages]


def results(summary: Summary) -> Listed:
    """The first table: what it costs and whether it is right, in one row."""
    titles = (
        "variant", "state", "top-1\nKL, nats", "first token\nms", "decode\ntokens/s", "answer\nms", "peak memory\nMB",
        "same\nanswers", "of the\nbandwidth", "size",
    )  # fmt: skip
    rows = [(name(row, summary), row.state.replace("_", " "), *_result(row)) for row in summary.rows]
    bad = frozenset(i for i, row in enumerate(summary.rows) if row.state != "ok")
    caption = "Medians over all questions; below them their 95 % intervals, below top-1 the KL divergence"
    return Listed(caption, titles, tuple(rows), frozenset((0, 1)), bad)


def _result(row: Row) -> Cells:
    agreement = row.agreement
    return (
        NONE if agreement is None else f"{share(agreement.top1)}\n({number(float(f'{agreement.kl:.2g}'))})",
        *(middle(row.stages.get(stage)) for stage in ("first_token", "decode_rate", "end_to_end")),
        middle(row.memory.get("peak")),
        NONE if agreement is None else share(agreement.same_answers),
        _share(row, "decode"),
        size(row.variant.bytes),
    )


def stages(summary: Summary, ask: str | None = None) -> Listed:
    """The median of every stage: over all questions, or of one."""
    rows = measured(summary)
    found = [row.stages if ask is None else row.asks.get(ask, {}) for row in rows]
    names = [stage for stage in STAGES if stage != "token" and any(stage in f for f in found)]
    titles = ("variant", *(f"{STAGES[s].title}\n{STAGES[s].unit}" for s in names))
    cells = [(name(r, summary), *(_median(f.get(s)) for s in names)) for r, f in zip(rows, found, strict=True) if f]
    return Listed("Medians of every stage" if ask is None else f"Medians of every stage: {ask}", titles, tuple(cells))


def spread(summary: Summary) -> Listed:
    """How far samples lie apart, of the quantities that a user feels."""
    titles = ("variant", "of", "samples", "median", "p90", "p95", "p99", "mean", "standard\ndeviation", "least", "most")
    rows = []
    for row in measured(summary):
        for stage in ("first_token", "decode", "token", "next_first_token", "end_to_end"):
            f = row.stages.get(stage)
            if f:
                numbers = (number(v) for v in (f.median, f.p90, f.p95, f.p99, f.mean, f.stdev, f.least, f.most))
                rows.append((name(row, summary), f"{STAGES[stage].title}, {STAGES[stage].unit}", f"{f.n:,}", *numbers))
    return Listed("All questions pooled, each with samples of its own", titles, tuple(rows), frozenset((0, 1)))


_COSTS: Final[dict[str, Callable[[Row], Figures | None]]] = {
    "load, files\nnot cached, ms": lambda r: r.loads.get("cold"),
    "load, files\ncached, ms": lambda r: r.loads.get("warm"),
    "load\nms": lambda r: r.loads.get(""),
    "libraries\nms": lambda r: r.imports,
    "before\nopening, MB": lambda r: r.memory.get("baseline"),
    "peak\nMB": lambda r: r.memory.get("peak"),
    "above\nthat, MB": lambda r: r.memory.get("above_baseline"),
    "anonymous\nMB": lambda r: r.memory.get("anonymous"),
    "mapped\nfiles, MB": lambda r: r.memory.get("mapped"),
    "GPU peak\nMB": lambda r: r.memory.get("gpu_peak"),
    "energy\nJ per answer": lambda r: r.energy,
}


def costs(summary: Summary) -> Listed:
    """Loading, memory and energy; columns that nobody has are left out."""
    rows = measured(summary)
    kept = [(title, value) for title, value in _COSTS.items() if any(value(r) for r in rows)]
    cells = [(name(r, summary), *(_median(value(r)) for _, value in kept)) for r in rows]
    caption = "Medians over the processes; what was not measured has no column"
    return Listed(caption, ("variant", *(title for title, _ in kept)), tuple(cells if kept else ()))


def agreement(summary: Summary) -> Listed:
    """How near each row is to the original's float32 answers, question by question."""
    titles = ("variant", "question", "top-1", "KL\nnats", "first other\ntoken", "answer")
    rows = []
    for row in measured(summary):
        for ask in row.agreement.asks if row.agreement else ():
            first = "none" if ask.first_divergent is None else f"{ask.first_divergent + 1}."
            said = cut(" ".join(ask.text.split()), 4 * _LONG)
            rows.append((name(row, summary), ask.ask, share(ask.top1), number(ask.kl), first, said))
    return Listed("Against the original's float32 answers", titles, tuple(rows), frozenset((0, 1, 5)))


_RATIOS: Final = {
    "first_token": "first token",
    "vision": "vision",
    "prefill": "prefill",
    "decode_rate": "decode rate",
    "end_to_end": "answer",
    "peak": "peak memory",
}


def beside(summary: Summary) -> Listed:
    """Times, rates and memory over those of the originals."""
    rows = [
        (name(row, summary), against.label, *(times(against.ratios.get(stage)) for stage in _RATIOS))
        for row in measured(summary)
        for against in row.against
    ]
    caption = (
        "Each over the original's, with 95 % intervals: times and memory below 1 are better, the decode rate above"
    )
    return Listed(caption, ("variant", "over", *_RATIOS.values()), tuple(rows), frozenset((0, 1)))


def ceilings(summary: Summary) -> Listed:
    """What the machine allows and how much of it was reached."""
    titles = (
        "variant", "threads", "bandwidth\nGB/s", "fastest product\nGFLOP/s", "decode at most\ntokens/s",
        "decode\nreached", "vision at least\nms per crop", "vision\nreached", "prefill\nreached",
    )  # fmt: skip
    rows = [
        (
            name(row, summary),
            str(ceiling.threads),
            number(ceiling.bandwidth),
            _fastest(ceiling.gemm),
            number(row.limits.get("decode_rate")),
            _share(row, "decode"),
            number(row.limits.get("vision_crop")),
            _share(row, "vision"),
            _share(row, "prefill"),
        )
        for row in measured(summary)
        if (ceiling := row.ceiling)
    ]
    return Listed("Measured in this run with as many threads", titles, tuple(rows))


def sustained(summary: Summary) -> Listed:
    """The first and the last minute under load."""
    kinds = {"decode_rate": "decode, tokens/s", "first_token": "first token, ms", "end_to_end": "answer, ms"}
    titles = ("variant", "minutes", "answers", *(f"{t}\n{w} minute" for t in kinds.values() for w in ("first", "last")))
    rows = [
        (name(s, summary), number(s.minutes), f"{s.answers:,}", *(c for k in kinds for c in _ends(s.curves.get(k))))
        for s in summary.sustained
    ]
    return Listed("Answering without a pause: the first and the last minute", titles, tuple(rows))


def tuned(summary: Summary) -> Listed:
    """What each number of threads gave, and which was taken."""
    stages = {"vision": "vision", "prefill": "prefill", "decode": "decode\nper token", "end_to_end": "answer"}
    rows = []
    for found in summary.tuned:
        for threads, ms in found.curve.items():
            best = [title.split("\n")[0] for stage, title in stages.items() if found.best.get(stage) == threads]
            taken = "taken" if threads == found.chosen else ""
            notes = "; ".join(filter(None, (taken, f"best for {', '.join(best)}" if best else "")))
            label = found.label if len(summary.devices) == 1 else f"{found.label} on {found.device}"
            rows.append((label, str(threads), *(number(ms.get(stage)) for stage in stages), notes))
    titles = ("variant", "threads", *(f"{title}, ms" for title in stages.values()), "")
    return Listed("Short runs before the rounds", titles, tuple(rows), frozenset((0, len(titles) - 1)))


def failures(summary: Summary) -> Listed:
    """What did not end well, and why."""
    rows = [
        (name(row, summary), f"{n} of {sum(row.statuses.values())}", status.replace("_", " "), "; ".join(row.reasons))
        for row in summary.rows
        for status, n in row.statuses.items()
        if status != "ok"
    ]
    words = frozenset((0, 1, 2, 3))
    return Listed("Processes that did not end well", ("variant", "processes", "how", "why"), tuple(rows), words)


def unavailable(summary: Summary) -> Listed:
    """What was asked for and cannot run there."""
    rows = [(row.label, row.device, "; ".join(row.reasons)) for row in summary.unavailable]
    return Listed("Not available, and not replaced by anything else", ("variant", "device", "why"), tuple(rows), _WORDS)


_WORDS: Final = frozenset((0, 1, 2))


def questions(summary: Summary) -> Listed:
    """What was asked, and what it is made of."""
    counts = {ask: c for row in reversed(summary.rows) for ask, c in row.counts.items()}
    titles = (
        "name",
        "question",
        "picture",
        "crops",
        "encoded",
        "picture's\npositions",
        "question's\ntokens",
        "generated",
    )
    rows = []
    for ask in summary.work.asks:
        c = counts.get(ask.name)
        told = (c.crops, c.encoded_crops, c.image_tokens, c.prompt_tokens, c.generated) if c else (None,) * 5
        picture = f"{ask.width} \u00d7 {ask.height}"
        rows.append((ask.name, ask.question or "(a caption)", picture, *(number(v) for v in told)))
    return Listed("Crops that equal another are encoded once", titles, tuple(rows), _WORDS)


def middle(found: Figures | None) -> str:
    """A median, and its interval below."""
    if found is None:
        return NONE
    return f"{number(found.median)}{_interval(found.low, found.high)}"


def times(found: Ratio | None) -> str:
    """A ratio, and its interval below."""
    return NONE if found is None else f"{_two(found.value)}{_interval(found.low, found.high, _two)}"


def _interval(low: float | None, high: float | None, write: Callable[[float], str] = number) -> str:
    return "" if low is None or high is None else f"\n({write(low)}\u2013{write(high)})"


def _two(value: float) -> str:
    """Ratios near 1 differ in their second decimal."""
    return f"{value:.2f}" if 0.1 <= value < 10 else number(value)


def _median(found: Figures | None) -> str:
    return number(None if found is None else found.median)


def _fastest(gemm: dict[str, float]) -> str:
    if not gemm:
        return NONE
    kind = max(gemm, key=lambda k: gemm[k])
    return f"{number(gemm[kind])}\n({kind})"


def _share(row: Row, stage: str) -> str:
    return share(row.reached[stage]) if stage in row.reached else NONE


def _ends(curve: Curve | None) -> Sequence[str]:
    return (NONE, NONE) if curve is None else (number(curve.first), number(curve.last))


def parts(found: dict[str, Figures], whole: str = "first_token") -> tuple[tuple[str, float], ...]:
    """What a first token, or an answer ("end_to_end"), is made of, in ms: medians, and what they leave of it."""
    pieces = [(STAGES[p].title, found[p].median) for p in PARTS if p in found]
    first = found["first_token"].median if "first_token" in found else 0.0
    rest = first - sum(v for _, v in pieces)
    if rest > 0.005 * first:
        pieces.append((REST, rest))
    if whole != "first_token" and whole in found:
        pieces.append((AFTER, max(found[whole].median - first, 0.0)))
    return tuple(pieces)
