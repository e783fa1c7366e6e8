"""`--tune threads`: short jobs with 1, 2, 4, ... threads, and what is best for each stage and for an answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from vlmedge.device_bench.execution import medians
from vlmedge.device_bench.job import Job, Variant, Work
from vlmedge.device_bench.result import Record

STAGES: Final = ("vision", "prefill", "decode")
ANSWER: Final = "end_to_end"
TOKENS: Final = 16  # of an answer, at most: enough for a decode rate
ROUND: Final = 0  # of the records: they belong to no round


@dataclass(frozen=True, slots=True)
class Tuned:
    """A variant's best numbers of threads on a device.

    `best`: of each stage that was measured. `chosen`: the best for a whole answer, which the run goes on with. `curve`:
    threads -> stage -> median ms.
    """

    device: str
    label: str
    best: dict[str, int]
    chosen: int
    curve: dict[int, dict[str, float]]


def thread_counts(logical: int, physical: int | None) -> tuple[int, ...]:
    """1, 2, 4, ... up to the logical processors, these, and the physical cores."""
    found = {1 << n for n in range(logical.bit_length()) if 1 << n <= logical} | {logical}
    return tuple(sorted(found | ({physical} if physical else set())))


def tuning_job(device: str, variant: Variant, work: Work, threads: int) -> Job:
    """A short job with so many threads: the first ask, a few tokens, without agreement."""
    short = replace(
        work, asks=work.asks[:1], tokens=min(work.tokens, TOKENS), warmup=1, repeat=min(work.repeat, 2), min_seconds=0.0
    )
    label = f"{variant.label}{_suffix(threads)}"
    return Job("measure", device, short, ROUND, replace(variant, label=label, threads=threads))


def tuned(records: Iterable[Record]) -> list[Tuned]:
    """What the records of tuning jobs say, in their order; variants that never answered are left out."""
    curves: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for record in records:
        if (found := _point(record)) is not None:
            label, threads, stages = found
            curves.setdefault((record.device, label), {})[threads] = stages
    return [_tuned(device, label, curve) for (device, label), curve in curves.items()]


def is_tuning(record: Record) -> bool:
    """Was it a tuning job, which is no row of the comparison?"""
    return record.kind == "measure" and record.round == ROUND and record.reply.status != "unavailable"


def _point(record: Record) -> tuple[str, int, dict[str, float]] | None:
    variant = record.variant
    if not is_tuning(record) or record.reply.status != "ok" or variant is None or variant.threads is None:
        return None
    stages = medians(record.reply)
    label = variant.label.removesuffix(_suffix(variant.threads))
    return (label, variant.threads, stages) if ANSWER in stages else None


def _tuned(device: str, label: str, curve: dict[int, dict[str, float]]) -> Tuned:
    curve = dict(sorted(curve.items()))
    best = dict(_best(curve))
    return Tuned(device, label, {stage: n for stage, n in best.items() if stage != ANSWER}, best[ANSWER], curve)


def _best(curve: dict[int, dict[str, float]]) -> Iterator[tuple[str, int]]:
    """(stage, threads that were fastest); of equal ones the fewest."""
    for stage in (*STAGES, ANSWER):
        known = [(stages[stage], threads) for threads, stages in curve.items() if stage in stages]
        if known:
            yield stage, min(known)[1]


def _suffix(threads: int) -> str:
    return f" ({threads} thread{'s' * (threads > 1)})"
