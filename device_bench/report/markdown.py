"""A run as Markdown with GitHub's tables: what the page says, without its plots."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from vlmedge.device_bench.report import tables, told
from vlmedge.device_bench.report.summary import Summary
from vlmedge.device_bench.report.tables import Listed
from vlmedge.webpage.markup import printable

# https://github.github.com/gfm/#backslash-escapes; `$` opens a formula, `@` a mention, on GitHub.
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~$&@])")
SIGNS = {"good": "✅", "bad": "❌", "warn": "⚠️"}


def render(summary: Summary) -> str:
    """The text of the Markdown file."""
    found = told.verdict(summary)
    blocks = [
        f"# Benchmark: {plain(summary.work.scenario)}",
        "  \n".join([f"{SIGNS[found.state]} **{plain(found.word)}**", *map(plain, found.lines)]),
        section("Results", listed(tables.results(summary))),
        section("Beside the original", listed(tables.beside(summary))),
        section("Agreement", listed(tables.agreement(summary))),
        section("Stage by stage", listed(tables.stages(summary)), listed(tables.spread(summary))),
        section("Loading, memory, energy", listed(tables.costs(summary))),
        section("The ceiling", listed(tables.ceilings(summary))),
        section("Threads", listed(tables.tuned(summary))),
        section("Under load", listed(tables.sustained(summary))),
        section("Failed", listed(tables.failures(summary))),
        section("Notes", points(summary.notes)),
        section("Not available", listed(tables.unavailable(summary))),
        section("What was asked", listed(tables.questions(summary))),
        section("What was run", pairs(told.facts(summary))),
        *(section(f"Machine: {device}", pairs(told.machine(e))) for device, e in summary.environments.items()),
        section("How it is measured", points(f"{name}: {text}" for name, text in told.meanings(summary))),
    ]
    return "\n\n".join(filter(None, blocks)) + "\n"


def section(title: str, *content: str) -> str:
    """A part under its heading; nothing where there is no content."""
    found = "\n\n".join(filter(None, content))
    return f"## {plain(title)}\n\n{found}" if found else ""


def points(items: Iterable[str]) -> str:
    """A list."""
    return "\n".join(f"- {plain(item)}" for item in items)


def pairs(rows: Iterable[tuple[str, str]]) -> str:
    """A table of names and values without headings."""
    return _lines(("", ""), "ll", rows)


def listed(found: Listed) -> str:
    """A table under its caption; nothing where it has no rows."""
    if not found.rows:
        return ""
    sides = "".join("l" if i in found.words else "r" for i in range(len(found.columns)))
    return f"{plain(found.caption)}.\n\n{_lines(found.columns, sides, found.rows)}"


def plain(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(printable(text).split()))


def _lines(columns: Sequence[str], sides: str, rows: Iterable[Sequence[str]]) -> str:
    lines = [_line(row) for row in rows]
    rule = f"| {' | '.join('--:' if side == 'r' else '---' for side in sides)} |"
    return "\n".join([_line(columns), rule, *lines]) if lines else ""


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(map(plain, cells))} |"
