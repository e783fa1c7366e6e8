"""A verification as Markdown with GitHub's tables: what the page says, without its plots."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from vlmedge.parity import parts, summary
from vlmedge.parity.report import Report
from vlmedge.parity.summary import GROUPS
from vlmedge.webpage.markup import printable
from vlmedge.webpage.numbers import number

# https://github.github.com/gfm/#backslash-escapes; `$` opens a formula, `@` a mention, on GitHub.
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~$&@])")
_SIGNS = {"good": "✅", "bad": "❌", "warn": "⚠️"}
_READINGS = 50


def render(report: Report) -> str:
    """The text of the Markdown file."""
    found = summary.verdict(report)
    blocks = [
        f"# {_plain(report.bundle)}",
        "  \n".join([f"{_SIGNS[found.state]} **{_plain(found.word)}**", *map(_plain, found.lines)]),
        _table(("", ""), summary.key_numbers(report)),
        _section("Stage by stage", _table(_COLUMNS, _stages(report), "llrrrl")),
        _section("Token by token", _table(("reading", "positions"), _readings(report))),
        _section("What each part costs", _parts(report)),
        _section("What was compared", _points(f"{name}: {text}" for name, text in summary.comparisons(report))),
        _section("Notes", _points(report.notes)),
        _section("Facts", _table(("", ""), summary.facts(report))),
    ]
    return "\n\n".join(filter(None, blocks)) + "\n"


_COLUMNS = ("stage", "outcome", "relative RMS", "limit", "max abs", "more")


def _stages(report: Report) -> Iterable[Sequence[str]]:
    for i, s in enumerate(report.stages):
        against = f", {GROUPS[s.against].lower()}" if s.against else ""
        outcome = f"{s.outcome}, first" if i == report.failing else s.outcome
        numbers = (number(v) for v in (s.relative_rms, s.limit, s.max_abs))
        yield f"{summary.title(s.stage)}{against}", outcome, *numbers, summary.details(s)


def _readings(report: Report) -> list[tuple[str, str]]:
    found = summary.readings(report)
    rest = len(found) - _READINGS
    rows = [(reading.name, reading.sentence()) for reading in found[:_READINGS]]
    return [*rows, ("more", f"{rest} in the JSON report")] if rest > 0 else rows


def _parts(report: Report) -> str:
    titles = parts.columns(report)
    listed = _table(("part", *titles), parts.rows(report), "l" + "r" * len(titles))
    return f"{_plain(parts.sentence(report))}\n\n{listed}" if listed else ""


def _section(title: str, content: str) -> str:
    return f"## {title}\n\n{content}" if content else ""


def _points(items: Iterable[str]) -> str:
    return "\n".join(f"- {_plain(item)}" for item in items)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], align: str = "") -> str:
    """A table; `align` has l or r for each column. Nothing where there are no rows."""
    lines = [_line(map(_plain, row)) for row in rows]
    rule = _line("--:" if side == "r" else "---" for side in align or "l" * len(columns))
    return "\n".join([_line(columns), rule, *lines]) if lines else ""


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(printable(text).split()))
