"""A run as CSV in long form: a line per device, variant, ask and stage, for a spreadsheet or pandas.

All samples are in the run's records.jsonl; here is what they say.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import astuple, fields
from typing import Final

from vlmedge.device_bench.report.rows import Row
from vlmedge.device_bench.report.stages import STAGES
from vlmedge.device_bench.report.statistics import Figures
from vlmedge.device_bench.report.summary import Summary
from vlmedge.webpage.markup import printable

ALL: Final = "*"  # over all asks
_VARIANT: Final = ("format", "profile", "bytes", "bits_per_weight", "runtime", "unit", "dtype", "digest")
COLUMNS: Final = (
    "device", "label", *_VARIANT, "threads", "state", "reason", "top1", "kl", "same_answers", "ask", "stage", "unit_of",
    *(f.name for f in fields(Figures)),
)  # fmt: skip
_NOTHING: Final = ("",) * len(fields(Figures))


def render(summary: Summary) -> str:
    """The text of the CSV file (RFC 4180, numbers unrounded, empty where nothing was measured).

    `ask` is "*" over all asks, and for what has none: load, memory, energy, the fractions of the ceiling. A row that
    measured nothing has one line with its state and reason. Texts that a spreadsheet would take for a formula get an
    apostrophe in front.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in (*summary.rows, *summary.unavailable):
        head = [_text(v) for v in _head(row)]
        lines = list(_lines(row)) or [(ALL, "", "", *_NOTHING)]
        writer.writerows([*head, *(_text(v) for v in line)] for line in lines)
    return out.getvalue()


def _head(row: Row) -> Iterable[object]:
    yield from (row.device, row.label, *(getattr(row.variant, name) for name in _VARIANT), row.threads)
    yield from (row.state, "; ".join(row.reasons))
    agreement = row.agreement
    yield from (agreement.top1, agreement.kl, agreement.same_answers) if agreement else (None,) * 3


def _lines(row: Row) -> Iterable[tuple[object, ...]]:
    for ask, stages in ({ALL: row.stages} | row.asks).items():
        for stage, found in stages.items():
            yield ask, stage, STAGES[stage].unit, *astuple(found)
    for state, found in row.loads.items():
        yield ALL, f"load_{state}" if state else "load", "ms", *astuple(found)
    for name, unit, once in (("import", "ms", row.imports), ("energy", "J", row.energy)):
        if once:
            yield ALL, name, unit, *astuple(once)
    for name, found in row.memory.items():
        yield ALL, f"memory_{name}", "MB", *astuple(found)
    for stage, value in row.reached.items():
        yield ALL, f"reached_{stage}", "share", *_single(value)


def _single(value: float) -> tuple[object, ...]:
    return tuple(value if f.name == "median" else "" for f in fields(Figures))


def _text(value: object) -> object:
    """Nothing for None; https://owasp.org/www-community/attacks/CSV_Injection for the apostrophe."""
    if not isinstance(value, str):
        return "" if value is None else value
    found = printable(value)
    return f"'{found}" if found.startswith(("=", "+", "-", "@", "\t")) else found
