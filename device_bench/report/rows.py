"""One row of the report: a variant on a device, with its speed, its memory and its agreement side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median
from typing import Final, TypeVar

from vlmedge.device_bench.job import Variant
from vlmedge.device_bench.report.chosen import counted, is_calm, samples
from vlmedge.device_bench.report.stages import STAGES
from vlmedge.device_bench.report.statistics import Figures, Ratio, Samples, figures
from vlmedge.device_bench.result import AskAgreement, Ceiling, Costs, Counts, Record

T = TypeVar("T")

# Of the positions along the original's own tokens: with fewer equal best tokens a row is marked and is never named
# fastest. A declared line, not a law: rounding changes near ties, a wrong mask or picture changes most positions.
TOP1_LEAST: Final = 0.9
_MEMORY: Final = ("baseline", "loaded", "peak", "above_baseline", "anonymous", "mapped", "gpu_peak")


@dataclass(frozen=True, slots=True)
class Agree:
    """Agreement with the original's float32 answers, in mean over the rounds; `asks` are the last round's."""

    top1: float
    kl: float
    same_answers: float
    asks: tuple[AskAgreement, ...]


@dataclass(frozen=True, slots=True)
class Against:
    """A row beside an original on the same device: ratios by stage, of `decode_rate` and of the memory's `peak`."""

    label: str
    ratios: dict[str, Ratio]


@dataclass(frozen=True, slots=True)
class Row:
    """What came of one variant on one device.

    `statuses` counts its processes by how they ended, `reasons` are those of the failed. `asked`: False for a unit that
    is only listed. `rounds`: processes that its numbers are made of, `calm`: were they? `left_out`: measured, but not
    calm, where others were. `loads`: by the state of the files ("cold", "warm", "").
    `stages`: over all asks (`statistics.Figures`), `asks`: of each. `memory` in MB, by `result.Memory`'s fields and
    "above_baseline"; `energy` in J per answer. `limits`: what the ceiling allows, "decode_rate" in tokens/s,
    "vision_crop" and "prefill" in ms; `reached`: the fractions of the ceiling.
    """

    device: str
    host: str
    variant: Variant
    statuses: dict[str, int]
    reasons: tuple[str, ...]
    asked: bool
    rounds: int
    calm: bool
    left_out: int
    loads: dict[str, Figures]
    imports: Figures | None
    stages: dict[str, Figures]
    asks: dict[str, dict[str, Figures]]
    counts: dict[str, Counts]
    memory: dict[str, Figures]
    energy: Figures | None
    energy_note: str
    agreement: Agree | None
    ceiling: Ceiling | None
    costs: Costs | None
    limits: dict[str, float]
    reached: dict[str, float]
    threads: int | None
    against: tuple[Against, ...] = ()

    @property
    def label(self) -> str:
        """The variant's, which is unique on its device."""
        return self.variant.label

    @property
    def disagrees(self) -> bool:
        """Is it a model that says something else than the original?"""
        return self.agreement is not None and self.agreement.top1 < TOP1_LEAST

    @property
    def failed(self) -> int:
        """How many of its processes did not end well."""
        return sum(n for status, n in self.statuses.items() if status != "ok")

    @property
    def state(self) -> str:
        """How most of those ended that did not end well; "disagrees" or "ok" where all did."""
        worst = max((s for s in self.statuses if s != "ok"), key=lambda s: self.statuses[s], default="ok")
        return worst if worst != "ok" else "disagrees" if self.disagrees else "ok"


def row(variant: Variant, records: Sequence[Record]) -> Row:
    """The row of a variant on a device, from its records there; see `chosen.counted` for which of them count."""
    used = counted(records)
    asks = ask_names(records[0])
    by_ask = {ask: _figures_by_stage(used, [ask]) for ask in asks}
    ceiling, costs = _latest(r.ceiling for r in used), _latest(r.reply.costs for r in used)
    energy = [r.reply.energy for r in used if r.reply.energy]
    return Row(
        device=records[0].device,
        host=records[0].host,
        variant=variant,
        statuses=dict(Counter(r.reply.status for r in records)),
        reasons=tuple(dict.fromkeys(r.reply.reason for r in records if r.reply.reason)),
        asked=any(r.round > 0 for r in records),
        rounds=len(used),
        calm=all(map(is_calm, used)),
        left_out=sum(r.reply.status == "ok" and r not in used for r in records),
        loads=_loads(records),
        imports=figures(each(used, lambda r: None if r.reply.load is None else r.reply.load.import_ms)),
        stages=_figures_by_stage(used, asks),
        asks={ask: found for ask, found in by_ask.items() if found},
        counts={c.ask: c for r in used for c in r.reply.counts},
        memory=_memory(used),
        energy=figures(each(used, lambda r: None if r.reply.energy is None else r.reply.energy.per_answer)),
        energy_note=next((e.counter or e.reason for e in energy), ""),
        agreement=agreement(used),
        ceiling=ceiling,
        costs=costs,
        limits=_limits(ceiling, costs),
        reached=_reached(used),
        threads=_latest(r.reply.threads for r in used),
    )


def _figures_by_stage(records: Sequence[Record], asks: Sequence[str]) -> dict[str, Figures]:
    """Of every stage that was measured; single tokens have percentiles, but no interval: they are too many."""
    found = {s: figures(stage_samples(records, s, asks), interval=s != "token") for s in STAGES}
    return {stage: value for stage, value in found.items() if value}


def peaks(records: Iterable[Record]) -> Samples:
    """The memory peaks, a process each."""
    return each(records, lambda r: None if r.reply.memory is None else r.reply.memory.peak)


def stage_samples(records: Sequence[Record], stage: str, asks: Iterable[str]) -> Samples:
    """A stage's samples of every ask, in the order of `asks`."""
    return [samples(records, ask, stage) for ask in asks]


def ask_names(record: Record) -> list[str]:
    """The names of its asks, in their order."""
    return [ask.name for ask in record.work.asks]


def each(records: Iterable[Record], value: Callable[[Record], float | None]) -> Samples:
    """One number a process, as samples of one ask."""
    found = (value(record) for record in records)
    return [[[] if v is None else [v] for v in found]]


def _loads(records: Iterable[Record]) -> dict[str, Figures]:
    """Loading by the state of the files: a cold one is round 1's, calm or not."""
    loads = [r.reply.load for r in records if r.reply.load]
    found = {state: figures([[[load.ms] for load in loads if load.files == state]]) for state in ("cold", "warm", "")}
    return {state: value for state, value in found.items() if value}


def _memory(records: Sequence[Record]) -> dict[str, Figures]:
    found = {name: figures(each(records, partial(_of_memory, name))) for name in _MEMORY}
    return {name: value for name, value in found.items() if value}


def _of_memory(name: str, record: Record) -> float | None:
    value: float | None = getattr(record.reply.memory, name, None)
    return value


def agreement(records: Iterable[Record]) -> Agree | None:
    """In mean over the processes; None where none has any."""
    found = [r.reply.agreement for r in records if r.reply.agreement]
    if not found:
        return None
    top1, kl, same = (fmean(getattr(a, name) for a in found) for name in ("top1", "kl", "same_answers"))
    return Agree(top1, kl, same, found[-1].asks)


def _limits(ceiling: Ceiling | None, costs: Costs | None) -> dict[str, float]:
    """The decode rate that the bandwidth allows, and the time of a crop at the rate of the fastest product."""
    if ceiling is None or costs is None:
        return {}
    found = {}
    read, fastest = costs.weight_bytes_per_token + costs.kv_bytes_per_token, max(ceiling.gemm.values(), default=0.0)
    if read > 0 and ceiling.bandwidth > 0:
        found["decode_rate"] = ceiling.bandwidth * 1e9 / read
    if fastest > 0 and costs.flops_per_crop > 0:
        found["vision_crop"] = costs.flops_per_crop / (fastest * 1e9) * 1000
    if fastest > 0 and costs.flops_prefill > 0:
        found["prefill"] = costs.flops_prefill / (fastest * 1e9) * 1000
    return found


def _reached(records: Sequence[Record]) -> dict[str, float]:
    names = dict.fromkeys(name for r in records for name in r.reached)
    return {name: median(r.reached[name] for r in records if name in r.reached) for name in names}


def _latest(found: Iterable[T | None]) -> T | None:
    return next((v for v in reversed(list(found)) if v is not None), None)
