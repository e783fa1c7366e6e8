"""Rows beside the original: how much faster, how much smaller, on the same device in the same run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from vlmedge.device_bench.report.chosen import counted
from vlmedge.device_bench.report.rows import Against, Row, ask_names, peaks, stage_samples
from vlmedge.device_bench.report.statistics import Ratio, ratio
from vlmedge.device_bench.result import Record

STAGES: Final = ("first_token", "vision", "prefill", "decode_rate", "end_to_end")


def beside(rows: Sequence[Row], records: Mapping[tuple[str, str], Sequence[Record]]) -> tuple[Row, ...]:
    """The rows with their ratios to every original of their device; `records` are by device and label."""
    return tuple(replace(row, against=_against(row, rows, records)) for row in rows)


def _against(row: Row, rows: Sequence[Row], records: Mapping[tuple[str, str], Sequence[Record]]) -> tuple[Against, ...]:
    ours = counted(records[row.device, row.label])
    found = []
    for base in originals(rows, row):
        theirs = counted(records[base.device, base.label])
        ratios = _ratios(ours, theirs) if ours and theirs else {}
        if ratios:
            found.append(Against(base.label, ratios))
    return tuple(found)


def originals(rows: Sequence[Row], row: Row) -> list[Row]:
    """The originals to compare with: of the row's device, one per dtype, on the row's unit where there is one."""
    found: dict[str, Row] = {}
    for base in rows:
        if base.variant.is_original and base.device == row.device and base.label != row.label:
            known = found.get(base.variant.dtype)
            if known is None or (base.variant.unit == row.variant.unit != known.variant.unit):
                found[base.variant.dtype] = base
    return list(found.values())


def _ratios(ours: Sequence[Record], theirs: Sequence[Record]) -> dict[str, Ratio]:
    asks = ask_names(ours[0])
    found = {s: ratio(stage_samples(ours, s, asks), stage_samples(theirs, s, asks)) for s in STAGES}
    found["peak"] = ratio(peaks(ours), peaks(theirs))
    return {name: value for name, value in found.items() if value}
