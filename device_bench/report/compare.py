"""One run beside another: what got slower, larger or less right, and how sure that is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal, TypeAlias

from vlmedge.device_bench.report.chosen import counted, last_tries
from vlmedge.device_bench.report.rows import TOP1_LEAST, agreement, each, peaks, stage_samples
from vlmedge.device_bench.report.statistics import Ratio, Samples, figures, ratio
from vlmedge.device_bench.report.summary import by_row
from vlmedge.device_bench.result import Record
from vlmedge.webpage.numbers import number, share, size

SCHEMA: Final = "vlmedge.bench-comparison/1"

# regression: worse by more than the tolerance, and the whole interval is on the worse side of 1. improvement: the same
# to the better side. unsure: beyond the tolerance, but the interval includes 1, or there is none. same: within it.
Verdict: TypeAlias = Literal["regression", "improvement", "unsure", "same"]
# failing: a larger share of its processes does not end well in B than in A. fixed: a smaller one. broken: none ends
# well in either. missing: in A only. new: in B only.
State: TypeAlias = Literal["measured", "failing", "missing", "new", "fixed", "broken"]

Worse: TypeAlias = Literal["up", "down"]
Pair: TypeAlias = tuple[Sequence[Record], Sequence[Record]]
Groups: TypeAlias = Mapping[tuple[str, str], Sequence[Record]]


@dataclass(frozen=True, slots=True)
class Change:
    """A quantity of a row in A and in B, in `unit`, and B over A with its 95 % interval.

    `worse` says where worse is: "up" for times, memory, energy and size, "down" for agreement.
    """

    quantity: str
    unit: str
    worse: Worse
    a: float
    b: float
    ratio: Ratio
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Compared:
    """A row of both runs, or of one of them; `reason` says why it does not run in B."""

    device: str
    label: str
    state: State
    changes: tuple[Change, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Run B beside run A. `tolerance`: a share (0.05: 5 %). `notes` say why it is not `comparable`, if so."""

    a: tuple[str, ...]
    b: tuple[str, ...]
    tolerance: float
    comparable: bool
    notes: tuple[str, ...]
    rows: tuple[Compared, ...]

    @property
    def regressions(self) -> tuple[str, ...]:
        """Each regression in one line; an empty tuple where nothing got worse."""
        return tuple(line for found in self.rows for line in _regressions(found))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"schema": SCHEMA, **asdict(self), "regressions": list(self.regressions)}


def compare(a: Sequence[Record], b: Sequence[Record], tolerance: float) -> Comparison:
    """Compare two runs' records, at least one each, row by row; rows match by device and label.

    Only calm processes count, as in the report. Agreement and size have no interval and need none: the same files give
    the same answers. A row whose agreement falls below `TOP1_LEAST` is a regression whatever the tolerance.
    """
    before, after = by_row(last_tries(a)), by_row(last_tries(b))
    unlike = tuple(_unlike(before, after))
    pairs = {key: (before.get(key, ()), after.get(key, ())) for key in dict.fromkeys((*before, *after))}
    meant = {key: pair for key, pair in pairs.items() if not all(map(_is_listed, pair))}
    rows = tuple(_compared(key, *pair, tolerance) for key, pair in meant.items())
    notes = (*unlike, *_strangers(rows), *_few(before, after))
    return Comparison(_runs(a), _runs(b), tolerance, not unlike, notes, rows)


def judge(found: Ratio, worse: str, tolerance: float, *, exact: bool = False) -> Verdict:
    """What B over A means. `exact`: a number without spread, which needs no interval."""
    up = worse == "up"
    value = found.value if up else (1 / found.value if found.value else float("inf"))
    if 1 / (1 + tolerance) <= value <= 1 + tolerance:
        return "same"
    if not exact and (found.low is None or found.high is None or found.low <= 1 <= found.high):
        return "unsure"
    return "regression" if value > 1 else "improvement"


def _compared(key: tuple[str, str], a: Sequence[Record], b: Sequence[Record], tolerance: float) -> Compared:
    device, label = key
    if _is_listed(a) or not b:
        return Compared(device, label, "new" if b else "missing")
    reasons = dict.fromkeys(r.reply.reason for r in b if r.reply.reason)
    changes = tuple(_changes((counted(a), counted(b)), tolerance))
    return Compared(device, label, _state(_failing(a), _failing(b)), changes, "; ".join(reasons))


def _is_listed(records: Sequence[Record]) -> bool:
    """Is it only a unit that was not there and not asked for, or nothing at all?"""
    return all(r.round == 0 and r.reply.status == "unavailable" for r in records)


def _strangers(rows: Sequence[Compared]) -> Iterable[str]:
    if all(row.state in ("missing", "new") for row in rows):
        yield "A and B have no row in common: rows match by device and label, which comes from the folder's name"


def _state(before: float, after: float) -> State:
    if before == after:
        return "broken" if after == 1 else "measured"
    return "failing" if after > before else "fixed"


def _failing(records: Sequence[Record]) -> float:
    """The share of processes that did not end well."""
    return sum(r.reply.status != "ok" for r in records) / len(records)


_STAGES: Final = {
    "first token": "first_token",
    "vision": "vision",
    "prefill": "prefill",
    "decode per token": "decode",
    "answer": "end_to_end",
}


def _changes(pair: Pair, tolerance: float) -> Iterable[Change]:
    if not all(pair):
        return
    for title, unit, before, after in _measured(*pair):
        found, middles = ratio(after, before), (figures(before, interval=False), figures(after, interval=False))
        if found and middles[0] and middles[1]:
            verdict = judge(found, "up", tolerance)
            yield Change(title, unit, "up", middles[0].median, middles[1].median, found, verdict)
    before_bytes, after_bytes = (r[-1].variant.bytes if r[-1].variant else 0 for r in pair)
    yield from _exact("size", "bytes", "up", before_bytes, after_bytes, tolerance)
    agree = agreement(pair[0]), agreement(pair[1])
    if agree[0] and agree[1]:
        yield from _top1(agree[0].top1, agree[1].top1, tolerance)
        yield from _exact("same answers", "share", "down", agree[0].same_answers, agree[1].same_answers, tolerance)


def _measured(a: Sequence[Record], b: Sequence[Record]) -> Iterable[tuple[str, str, Samples, Samples]]:
    """What has samples: its name, its unit, those of A and of B; stages over the asks that both have."""
    asks = [name for name, ask in _asks(a).items() if _asks(b).get(name) == ask]
    for title, stage in _STAGES.items():
        yield title, "ms", stage_samples(a, stage, asks), stage_samples(b, stage, asks)
    for state, title in (("cold", "load, not cached"), ("warm", "load, cached"), ("", "load")):
        yield title, "ms", _loads(a, state), _loads(b, state)
    yield "peak memory", "MB", peaks(a), peaks(b)
    yield "energy per answer", "J", each(a, _energy), each(b, _energy)


def _asks(records: Sequence[Record]) -> dict[str, tuple[str, str]]:
    """What was asked, by name: the picture's hash and the question."""
    return {ask.name: (ask.sha256, ask.question) for ask in records[0].work.asks}


def _loads(records: Iterable[Record], state: str) -> Samples:
    return each(records, lambda r: r.reply.load.ms if r.reply.load and r.reply.load.files == state else None)


def _energy(record: Record) -> float | None:
    return record.reply.energy.per_answer if record.reply.energy else None


def _top1(before: float, after: float, tolerance: float) -> Iterable[Change]:
    for change in _exact("top-1", "share", "down", before, after, tolerance):
        yield replace(change, verdict="regression") if after < TOP1_LEAST <= before else change


def _exact(title: str, unit: str, worse: Worse, a: float, b: float, tolerance: float) -> Iterable[Change]:
    if a > 0:
        found = Ratio(b / a, None, None)
        yield Change(title, unit, worse, a, b, found, judge(found, worse, tolerance, exact=True))


def _runs(records: Iterable[Record]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(r.run for r in records))


def _unlike(a: Groups, b: Groups) -> Iterable[str]:
    """What else differs than what was to be compared: processors, threads, questions, answers' lengths."""
    for device in dict.fromkeys(device for device, _ in a):
        cpus = [_cpus(device, groups) for groups in (a, b)]
        if cpus[0] and cpus[1] and cpus[0] != cpus[1]:
            yield f"{device} was {cpus[0]} in A and is {cpus[1]} in B: the ratios tell of the machines as well"
    for key in a:
        if key not in b:
            continue
        threads = [sorted({r.reply.threads for r in groups[key] if r.reply.threads}) for groups in (a, b)]
        if threads[0] and threads[1] and threads[0] != threads[1]:
            before, after = (" and ".join(map(str, found)) for found in threads)
            yield f"{key[1]} ({key[0]}) had {before} threads in A and has {after} in B"
    yield from _unlike_work(a, b)


def _unlike_work(a: Groups, b: Groups) -> Iterable[str]:
    before, after = (next(iter(groups.values()), [None])[0] for groups in (a, b))
    if before is None or after is None:
        return
    if before.work.tokens != after.work.tokens:
        yield f"answers had {before.work.tokens} tokens in A and have {after.work.tokens} in B"
    asks = _asks([before]), _asks([after])
    unlike = [name for name in dict.fromkeys((*asks[0], *asks[1])) if asks[0].get(name) != asks[1].get(name)]
    if unlike:
        yield f"not asked alike, and left out of the times: {', '.join(unlike)}"


def _cpus(device: str, groups: Groups) -> str:
    found = (r.reply.environment.get("cpu") for (d, _), rs in groups.items() if d == device for r in rs)
    return ", ".join(dict.fromkeys(str(cpu) for cpu in found if cpu))


def _few(a: Groups, b: Groups) -> Iterable[str]:
    single = [key[1] for key in a if _lone(a[key]) or _lone(b.get(key, ()))]
    if single:
        yield (
            f"a single process in A or B: {', '.join(dict.fromkeys(single))}; what differs between processes is not in "
            "their intervals, and memory has none; run at least 2 rounds"
        )


def _lone(records: Sequence[Record]) -> bool:
    return len(counted(records)) == 1


def _regressions(found: Compared) -> Iterable[str]:
    where = f"{found.label} ({found.device})"
    if found.state == "missing":
        yield f"{where}: not in B"
    if found.state == "failing":
        yield f"{where}: fails in B: {found.reason or 'no reason was told'}"
    for change in found.changes:
        if change.verdict == "regression":
            yield f"{where}: {change.quantity} {told(change)}"


def told(change: Change) -> str:
    """A change in words: from, to, how many times."""
    ratio = change.ratio
    ends = "" if ratio.low is None or ratio.high is None else f" ({ratio.low:.3g} to {ratio.high:.3g})"
    return f"{value(change.a, change.unit)} \u2192 {value(change.b, change.unit)}, \u00d7 {ratio.value:.3g}{ends}"


def value(found: float, unit: str) -> str:
    """A number with its unit."""
    if unit == "bytes":
        return size(round(found))
    return share(found) if unit == "share" else f"{number(found)} {unit}"
