"""Speed over minutes: what a device does when it is warm is not what it does in the first minute."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from vlmedge.device_bench.report.stages import values
from vlmedge.device_bench.result import Record, Sample

_CURVES = ("first_token", "decode_rate", "end_to_end")


@dataclass(frozen=True, slots=True)
class Curve:
    """One quantity over time: its median in each minute of the run that has answers, as (minute from 0, value)."""

    points: tuple[tuple[int, float], ...]

    @property
    def first(self) -> float:
        """The first minute's."""
        return self.points[0][1]

    @property
    def last(self) -> float:
        """The last minute's."""
        return self.points[-1][1]


@dataclass(frozen=True, slots=True)
class Sustained:
    """A variant that answered without a pause. `curves`: "first_token" and "end_to_end" in ms, "decode_rate"."""

    device: str
    label: str
    answers: int
    minutes: float
    curves: dict[str, Curve]


def sustained(records: Iterable[Record]) -> tuple[Sustained, ...]:
    """The curves of the sustain jobs, in their order; those that measured nothing are left out."""
    return tuple(_sustained(r, r.variant.label) for r in records if r.variant and r.reply.samples)


def ranking(found: Sequence[Sustained], *, last: bool) -> list[str]:
    """The labels by decode rate, the fastest first, in the first or in the last minute."""
    known = [(s.label, s.curves["decode_rate"]) for s in found if "decode_rate" in s.curves]
    return [label for label, _ in sorted(known, key=lambda k: -(k[1].last if last else k[1].first))]


def _sustained(record: Record, label: str) -> Sustained:
    found = record.reply.samples
    curves = {name: _curve(record, found, name) for name in _CURVES}
    minutes = max(s.at + s.ms.get("end_to_end", 0.0) / 1000 for s in found) / 60
    known = {name: curve for name, curve in curves.items() if curve.points}
    return Sustained(record.device, label, len(found), minutes, known)


def _curve(record: Record, found: Sequence[Sample], stage: str) -> Curve:
    """Values over their ask's median, so that a minute with more of the hard asks is no slower one; scaled back."""
    counts = {c.ask: c for c in record.reply.counts}
    told = [(s.ask, int(s.at // 60), v) for s in found for v in values(s, counts.get(s.ask), stage)]
    asks = dict.fromkeys(ask for ask, _, _ in told)
    typical = {ask: median(v for a, _, v in told if a == ask) for ask in asks}
    scale = fmean(typical.values()) if typical else 0.0
    minutes: dict[int, list[float]] = {}
    for ask, minute, value in told:
        if typical[ask] > 0:
            minutes.setdefault(minute, []).append(value / typical[ask] * scale)
    return Curve(tuple((minute, median(minutes[minute])) for minute in sorted(minutes)))
