"""A comparison of two runs in words: for a terminal, and as Markdown with GitHub's tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from vlmedge.device_bench.report.compare import Compared, Comparison, told, value
from vlmedge.device_bench.report.markdown import SIGNS, listed, plain, points, section
from vlmedge.device_bench.report.tables import Listed, times
from vlmedge.webpage.markup import printable
from vlmedge.webpage.numbers import share

_RULE: Final = (
    "A regression is worse by more than the tolerance, with the whole 95 % interval on the worse side of 1. Unsure is "
    "beyond the tolerance with an interval that includes 1, or without any. Size and agreement have no spread: the "
    "tolerance alone decides."
)


def render_text(found: Comparison) -> str:
    """Lines for a terminal: what changed, row by row; what stayed the same is counted."""
    lines = [f"{_runs(found.a)} (A) and {_runs(found.b)} (B), tolerance {share(found.tolerance)}"]
    lines += [f"  note: {note}" for note in found.notes]
    for row in found.rows:
        lines += [f"{row.label} ({row.device}): {_state(row)}", *(f"  {line}" for line in _changed(row))]
    count = len(found.regressions)
    lines.append("no regression" if not count else "1 regression" if count == 1 else f"{count} regressions")
    return "\n".join(printable(" ".join(line.split()) if line[:1] != " " else line) for line in lines) + "\n"


def render_markdown(found: Comparison) -> str:
    """The text of a Markdown file: the regressions, then every quantity."""
    count = len(found.regressions)
    sign, word = (SIGNS["bad"], "Regressions") if count else (SIGNS["good"], "No regression")
    blocks = [
        "# Benchmark: B beside A",
        f"{sign} **{word}**  \nA: {plain(_runs(found.a))}  \nB: {plain(_runs(found.b))}  \n"
        f"Tolerance: {share(found.tolerance)}",
        section("Regressions", points(found.regressions)),
        section("Notes", points(found.notes)),
        *(section(f"{row.label} ({row.device})", plain(_state(row)), listed(_table(row))) for row in found.rows),
        _RULE,
    ]
    return "\n\n".join(filter(None, blocks)) + "\n"


def _table(row: Compared) -> Listed:
    rows = [(c.quantity, value(c.a, c.unit), value(c.b, c.unit), times(c.ratio), c.verdict) for c in row.changes]
    return Listed("B over A, with 95 % intervals", ("", "A", "B", "B / A", ""), tuple(rows), frozenset((0, 4)))


def _runs(names: Iterable[str]) -> str:
    return ", ".join(names)


def _state(row: Compared) -> str:
    words = {
        "measured": "measured in both",
        "failing": f"fails in B: {row.reason or 'no reason was told'}",
        "fixed": "failed in A, and does so less in B",
        "broken": f"fails in both: {row.reason or 'no reason was told'}",
        "missing": "not in B",
        "new": "not in A",
    }
    return words[row.state]


def _changed(row: Compared) -> Iterable[str]:
    for change in row.changes:
        if change.verdict != "same":
            yield f"{change.verdict}: {change.quantity} {told(change)}"
    same = [change.quantity for change in row.changes if change.verdict == "same"]
    if same:
        yield f"same: {'; '.join(same)}"
