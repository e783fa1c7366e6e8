"""Which records count: the last try of each job, and of those the calm ones, where there are calm ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from vlmedge.device_bench.report.stages import values
from vlmedge.device_bench.result import Record
from vlmedge.webpage.numbers import share

DRIFT: Final = 0.10  # anchors around a job that were further off: the machine was another one
OTHERS: Final = 0.2  # processors that other processes took meanwhile

CALM: Final = (
    f"A process counts as calm where the anchors around it were within {share(DRIFT)} of the first ones and other "
    f"programs took no more than {OTHERS} processors meanwhile. Where a row has calm ones, only these count."
)


def is_calm(record: Record) -> bool:
    """Was the machine as at the start, and ours? What was not measured is taken as calm."""
    others = record.reply.others
    return abs(record.drift or 0.0) <= DRIFT and (others is None or others <= OTHERS)


def last_tries(records: Iterable[Record]) -> list[Record]:
    """Jobs that were run again replace their first tries, where these stood; anchors all stay.

    `drift` is then the worse of the anchors before and after a job: when its record was written, the next one was not
    known.
    """
    found: dict[object, Record] = {}
    for i, record in enumerate(_between_anchors(records)):
        key: object = (record.device, record.job) if record.kind != "anchor" else i
        if key not in found or record.again >= found[key].again:
            found[key] = record
    return list(found.values())


def _between_anchors(records: Iterable[Record]) -> list[Record]:
    after: dict[tuple[str, int | None], float] = {}
    found = []
    for record in reversed(list(records)):
        key = (record.device, record.reply.threads)
        if record.kind == "anchor" and record.drift is not None:
            after[key] = record.drift
        elif record.drift is not None and after.get(key, 0.0) > record.drift:
            record = replace(record, drift=after[key])
        found.append(record)
    return found[::-1]


def counted(records: Iterable[Record]) -> list[Record]:
    """Those of one row that its numbers are made of."""
    measured = [r for r in records if r.reply.status == "ok" and r.reply.samples]
    return [r for r in measured if is_calm(r)] or measured


def samples(records: Iterable[Record], ask: str, stage: str) -> list[list[float]]:
    """Of one ask and one stage: of each process, what was measured."""
    return [_values(record, ask, stage) for record in records]


def _values(record: Record, ask: str, stage: str) -> list[float]:
    counts = next((c for c in record.reply.counts if c.ask == ask), None)
    return [v for s in record.reply.samples if s.ask == ask for v in values(s, counts, stage)]
