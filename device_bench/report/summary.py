"""From a run's records to what is told of it: its rows, its curves, its machine, and what a reader must know."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from vlmedge.device_bench.job import Work
from vlmedge.device_bench.report.beside import beside
from vlmedge.device_bench.report.chosen import OTHERS, last_tries
from vlmedge.device_bench.report.load import moment
from vlmedge.device_bench.report.rows import TOP1_LEAST, Row, row
from vlmedge.device_bench.report.sustained import Sustained, ranking, sustained
from vlmedge.device_bench.result import Ceiling, Record
from vlmedge.device_bench.tuning import Tuned, is_tuning, tuned
from vlmedge.webpage.numbers import number, share

SCHEMA: Final = "vlmedge.bench-summary/1"


@dataclass(frozen=True, slots=True)
class Anchor:
    """The machine's ceilings at a time of the run, in minutes since its first record."""

    device: str
    minute: float
    ceiling: Ceiling


@dataclass(frozen=True, slots=True)
class Summary:
    """A run, at least one record of it. `devices`: the host of each. `started`: UTC, ISO 8601.

    `rows` in order of appearance; `unavailable` are those that could not be tried at all. `environments`: of each
    device, of the last process that told. `processes`: how many records the run has.
    """

    work: Work
    runs: tuple[str, ...]
    devices: dict[str, str]
    started: str
    minutes: float
    processes: int
    rows: tuple[Row, ...]
    unavailable: tuple[Row, ...]
    sustained: tuple[Sustained, ...]
    tuned: tuple[Tuned, ...]
    anchors: tuple[Anchor, ...]
    environments: dict[str, dict[str, Any]]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the samples are in the records."""
        return {"schema": SCHEMA, **asdict(self)}


def summarise(records: Sequence[Record]) -> Summary:
    """Sum up a run's records, at least one; an interrupted run has what is there."""
    kept = last_tries(records)
    groups = by_row(kept)
    rows = beside([row(v, found) for found in groups.values() if (v := found[0].variant)], groups)
    begin = min(map(moment, kept))
    end = max(moment(r).timestamp() + r.seconds for r in kept)
    curves = sustained(r for r in kept if r.kind == "sustain")
    return Summary(
        work=next((r for r in kept if r.kind in ("measure", "sustain")), kept[0]).work,
        runs=tuple(dict.fromkeys(r.run for r in kept)),
        devices={r.device: r.host for r in kept},
        started=begin.isoformat(timespec="seconds"),
        minutes=(end - begin.timestamp()) / 60,
        processes=len(records),
        rows=tuple(r for r in rows if not _is_unavailable(r)),
        unavailable=tuple(r for r in rows if _is_unavailable(r)),
        sustained=curves,
        tuned=tuple(tuned(kept)),
        anchors=tuple(
            Anchor(r.device, (moment(r) - begin).total_seconds() / 60, r.reply.ceiling)
            for r in kept
            if r.kind == "anchor" and r.reply.ceiling
        ),
        environments={r.device: r.reply.environment for r in kept if r.reply.environment},
        notes=tuple(_notes(kept, rows, curves)),
    )


def by_row(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """The records of measure jobs, those that sought a thread count left out, by device and label, as they appear."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.kind == "measure" and record.variant is not None and not is_tuning(record):
            found.setdefault((record.device, record.variant.label), []).append(record)
    return found


def _is_unavailable(found: Row) -> bool:
    return set(found.statuses) == {"unavailable"}


def _notes(records: Sequence[Record], rows: Sequence[Row], curves: Sequence[Sustained]) -> Iterable[str]:
    yield from _of_the_original(records, rows)
    for found in rows:
        if _is_unavailable(found) and found.asked:
            yield f"{found.label} is not available on {found.device}: {'; '.join(found.reasons)}"
    yield from _of_other_jobs(records)
    yield from _of_the_machine(records, rows)
    for device in dict.fromkeys(s.device for s in curves):
        here = [s for s in curves if s.device == device]
        first, last = ranking(here, last=False), ranking(here, last=True)
        if first != last:
            yield f"The ranking changes under load on {device}: {', '.join(first)} at first, {', '.join(last)} at last."


def _of_other_jobs(records: Sequence[Record]) -> Iterable[str]:
    """What failed besides the rows: minutes of load, anchors."""
    for record in records:
        if record.kind in ("sustain", "anchor") and record.reply.status != "ok":
            what = f"{record.variant.label} under load" if record.variant else "The machine's ceiling"
            status = record.reply.status.replace("_", " ")
            yield f"{what} on {record.device} was not measured ({status}): {record.reply.reason}"


def _of_the_machine(records: Sequence[Record], rows: Sequence[Row]) -> Iterable[str]:
    again = sum(r.again > 0 for r in records)
    if again:
        what = "1 process was" if again == 1 else f"{again} processes were"
        yield f"{what} run again, because the machine had slowed down; the last run counts."
    left = [f"{r.label} {r.left_out} of {r.left_out + r.rounds}" for r in rows if r.left_out]
    if left:
        yield f"Left out, because the machine was not calm: {', '.join(left)} processes."
    restless = [r.label for r in rows if not r.calm]
    if restless:
        yield (
            f"The machine was never calm for {', '.join(restless)}{_takers(records)}: their numbers are those of a "
            "busy machine; run again when it has nothing else to do."
        )
    single = [r.label for r in rows if r.rounds == 1]
    if single:
        yield f"A single process each: {', '.join(single)}. Intervals from its samples alone are too narrow."


def _other_answers(found: Row) -> int:
    return sum(not ask.same_answer for ask in found.agreement.asks) if found.agreement else 0


def _takers(records: Sequence[Record]) -> str:
    """What other programs took, where that is why."""
    most = max((r.reply.others or 0.0 for r in records if r.kind == "measure"), default=0.0)
    return f" (other programs took up to {number(most)} processors)" if most > OTHERS else ""


def _of_the_original(records: Sequence[Record], rows: Sequence[Row]) -> Iterable[str]:
    for record in records:
        if record.kind == "reference" and record.reply.status != "ok":
            yield f"The original gave no answers to compare with ({record.reply.status}): {record.reply.reason}"
    if any(r.stages for r in rows) and not any(r.agreement for r in rows):
        yield "Nothing was compared with an original: nothing here says that the answers are right."
    other = [f"{r.label} {n} of {len(r.agreement.asks)}" for r in rows if r.agreement and (n := _other_answers(r))]
    if other:
        yield f"Answers that are not the original's, word by word: {', '.join(other)}."
    for found in rows:
        if found.disagrees and found.agreement:
            yield (
                f"{found.label} disagrees: only {share(found.agreement.top1)} of its best tokens are the original's. "
                f"Below {share(TOP1_LEAST)} a row is marked, and its speed is taken for that of another model."
            )
