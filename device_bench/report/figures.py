"""The page's plots: where the time goes, what memory bounds, size and accuracy, every sample, minutes, anchors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Final

from vlmedge.device_bench.report.chosen import counted, samples
from vlmedge.device_bench.report.rows import TOP1_LEAST, Row, ask_names
from vlmedge.device_bench.report.stages import AFTER, PARTS, REST, STAGES
from vlmedge.device_bench.report.statistics import Figures
from vlmedge.device_bench.report.summary import Anchor, Summary
from vlmedge.device_bench.report.sustained import Sustained
from vlmedge.device_bench.report.tables import measured, name, parts
from vlmedge.device_bench.result import Record
from vlmedge.webpage import curves, plot
from vlmedge.webpage.curves import Curve
from vlmedge.webpage.markup import Html, element, join
from vlmedge.webpage.numbers import number, share, size
from vlmedge.webpage.scale import LinearAxis, linear_axis
from vlmedge.webpage.scatter import Point, scatter
from vlmedge.webpage.strips import Strip, strips

_NAMES: Final = (*(STAGES[p].title for p in PARTS), REST, AFTER)
_MEMORY: Final = ("before opening", "added by the model")
_FAR = 0.99  # of the samples lie within a strip's scale
_WIDEST = 0.5  # and at most so far from the median


def breakdown(summary: Summary) -> Html:
    """The parts of an answer in mean over the questions, and of the first token: of the quickest and slowest one."""
    rows = [row for row in measured(summary) if "first_token" in row.stages]
    if not rows:
        return Html()
    mean = [(name(row, summary), row.stages) for row in rows]
    whole = [(label, of) for label, of in mean if "end_to_end" in of]
    plots = [_parts("An answer", f"{_OVER}, {summary.work.tokens} tokens", whole, "end_to_end")] if whole else []
    asks = [(n, of) for n, of in _ordered(summary, rows) if len(of) == len(rows)]
    if len(asks) > 1:
        for word, (ask, of) in (("quickest", asks[0]), ("slowest", asks[-1])):
            plots.append(_parts(f"The first token, {word}: {ask}", "milliseconds", of))
    else:
        plots.append(_parts("The first token", _OVER, mean))
    used = {piece for row in rows for piece, _ in parts(row.stages, "end_to_end")}
    keys = [(sign, piece) for piece, sign in plot.colours((), _NAMES).items() if piece in used]
    return join(plot.legend(keys), element("div", *plots, class_="plots"))


_OVER: Final = "milliseconds, mean over the questions"
_Parts = list[tuple[str, dict[str, Figures]]]


def _ordered(summary: Summary, rows: Sequence[Row]) -> list[tuple[str, _Parts]]:
    """Each question's stages by row, the quickest question first."""
    found = []
    for ask in summary.work.asks:
        of = [(name(r, summary), r.asks[ask.name]) for r in rows if "first_token" in r.asks.get(ask.name, {})]
        if of:
            found.append((median(stages["first_token"].median for _, stages in of), ask.name, of))
    return [(ask, of) for _, ask, of in sorted(found, key=lambda f: f[0])]


def _parts(title: str, sentence: str, rows: _Parts, whole: str = "first_token") -> Html:
    found = [plot.Stack(label, parts(of, whole), f"{number(of[whole].median)} ms") for label, of in rows]
    spoken = "; ".join(f"{row.label} {row.note}" for row in found)
    return plot.figure(title, sentence, plot.stacks(found, title, spoken, _NAMES))


def bounded(summary: Summary) -> Html:
    """Decode rates and the times of large products beside what the machine allows."""
    found = (
        _bars(
            summary,
            "decode_rate",
            "Decode rate",
            "tokens/s; the tick is what the bandwidth allows, in brackets what part of it is reached",
        ),
        _bars(summary, "vision_crop", "Vision, per crop", _PRODUCTS),
        _bars(summary, "prefill", "Prefill", _PRODUCTS),
    )
    return element("div", *found, class_="plots") if any(found) else Html()


_PRODUCTS: Final = "ms; the tick is the time at the rate of the fastest product, in brackets its part"


def _bars(summary: Summary, stage: str, title: str, sentence: str) -> Html:
    rows = [row for row in measured(summary) if stage in row.stages]
    if not rows:
        return Html()
    limits = [row.limits.get(stage) for row in rows]
    values = [row.stages[stage].median for row in rows]
    axis = linear_axis([*values, *(v for v in limits if v is not None)])
    bars = [
        plot.Bar(name(row, summary), value, limit, _state(row), _note(value, row.reached.get(stage.split("_")[0])))
        for row, value, limit in zip(rows, values, limits, strict=True)
    ]
    spoken = "; ".join(f"{bar.label} {bar.note}" for bar in bars)
    return plot.figure(title, sentence, plot.bars(bars, axis, title, spoken))


def _note(value: float, reached: float | None) -> str:
    return number(value) if reached is None else f"{number(value)} ({share(reached)})"


def against_size(summary: Summary) -> Html:
    """Decode rate against size, and against accuracy with the size as area; numbers stand for the rows."""
    rows = [row for row in measured(summary) if "decode_rate" in row.stages]
    if not rows:
        return Html()
    keys = element("ol", *(element("li", name(row, summary)) for row in rows), class_="keys")
    y = linear_axis(row.stages["decode_rate"].median for row in rows)
    unit, word = (1e9, "GB") if max(row.variant.bytes for row in rows) >= 1e9 else (1e6, "MB")
    by_size = _scatter(
        summary, rows, linear_axis(r.variant.bytes / unit for r in rows), y, lambda r: r.variant.bytes / unit,
        lambda _: 0.0,
        (f"size of the files, {word}", "decode, tokens/s"), "Decode rate against size", "Up and to the left is better.",
    )  # fmt: skip
    known = [row for row in rows if row.agreement]
    largest = max(row.variant.bytes for row in rows) or 1
    low = min((_top1(row) for row in known), default=0.0)
    accuracy = linear_axis([100 * low, 100.0], zero=False, unit=" %")
    by_accuracy = (
        _scatter(
            summary, rows, accuracy, y, lambda r: 100 * _top1(r) if r.agreement else None,
            lambda r: r.variant.bytes / largest, ("top-1: same best token as the original", "decode, tokens/s"),
            "Decode rate against accuracy",
            f"Up and to the right is better; the area is the size; below {share(TOP1_LEAST)} it is red.",
        )
        if known
        else Html()
    )  # fmt: skip
    return join(element("div", memory(summary), by_size, by_accuracy, class_="plots"), keys)


def _scatter(
    summary: Summary, rows: Sequence[Row], x: LinearAxis, y: LinearAxis, value: Callable[[Row], float | None],
    weight: Callable[[Row], float], names: tuple[str, str], title: str, sentence: str,
) -> Html:  # fmt: skip
    found = []
    for i, row in enumerate(rows, 1):
        at, rate = value(row), row.stages["decode_rate"].median
        if at is not None:
            note = f"{name(row, summary)}: {number(rate)} tokens/s, {size(row.variant.bytes)}"
            found.append(Point(str(i), at, rate, weight(row), _state(row), note))
    spoken = "; ".join(point.note for point in found)
    return plot.figure(title, sentence, scatter(found, x, y, names, title, spoken))


def memory(summary: Summary) -> Html:
    """The peak of every worker, what its libraries need below it."""
    found = [stack for row in measured(summary) if (stack := _memory(row, summary))]
    if not found:
        return Html()
    keys = [(sign, piece) for piece, sign in plot.colours((), _MEMORY).items()]
    spoken = "; ".join(f"{row.label} {row.note}" for row in found)
    drawn = plot.stacks(found, "Peak memory", spoken, _MEMORY)
    return plot.figure("Peak memory", "of the worker's own process", join(plot.legend(keys), drawn))


def _memory(row: Row, summary: Summary) -> plot.Stack | None:
    if "peak" not in row.memory:
        return None
    peak = row.memory["peak"].median
    base = min(row.memory["baseline"].median, peak) if "baseline" in row.memory else 0.0
    gpu = f", GPU {size(round(row.memory['gpu_peak'].median * 1e6))}" if "gpu_peak" in row.memory else ""
    pieces = ((_MEMORY[0], base), (_MEMORY[1], peak - base))
    return plot.Stack(name(row, summary), pieces, f"{size(round(peak * 1e6))}{gpu}")


def scattering(summary: Summary, groups: dict[tuple[str, str], list[Record]]) -> Html:
    """Every sample as a dot, a line of dots per process, as far from its question's median as it is."""
    found = (
        _strips(summary, groups, "first_token", "First token: every sample"),
        _strips(summary, groups, "vision", "Vision: every sample"),
        _strips(summary, groups, "decode", "Decode: every sample"),
    )
    return element("div", *found, class_="plots") if any(found) else Html()


def _strips(summary: Summary, groups: dict[tuple[str, str], list[Record]], stage: str, title: str) -> Html:
    rows = [row for row in measured(summary) if stage in row.stages]
    lanes = [_lanes(counted(groups[row.device, row.label]), stage) for row in rows]
    away = sorted(abs(v) for found in lanes for lane in found for v in lane)
    if not away:
        return Html()
    reach = min(max(away[int(_FAR * (len(away) - 1))], 1.0), 100 * _WIDEST)
    axis = linear_axis([-reach * 1.02, reach * 1.02], unit=" %")
    found = [
        Strip(name(row, summary), lane, f"{row.stages[stage].n:,} samples")
        for row, lane in zip(rows, lanes, strict=True)
    ]
    spoken = "; ".join(f"{s.label} {s.note}" for s in found)
    sentence = "Distance from the median of the same question. A line of dots per process, the first on top."
    return plot.figure(title, sentence, strips(found, axis, title, spoken, 0.0))


def _lanes(records: Sequence[Record], stage: str) -> tuple[tuple[float, ...], ...]:
    """Of each process: its samples' distances in percent, thinned evenly to what a lane has room for."""
    lanes: list[list[float]] = [[] for _ in records]
    for ask in ask_names(records[0]):
        by_record = samples(records, ask, stage)
        pooled = [v for values in by_record for v in values]
        middle = median(pooled) if pooled else 0.0
        for lane, values in zip(lanes, by_record, strict=True):
            lane += [100 * (v / middle - 1) for v in values if middle]
    return tuple(tuple(lane[:: -(-len(lane) // _ROOM) or 1]) for lane in lanes)


_ROOM = 90  # dots in a lane


def under_load(summary: Summary) -> Html:
    """Decode rate and answer time, minute by minute."""
    found: list[Html] = []
    for device in summary.devices:
        where = f" on {device}" if len(summary.devices) > 1 else ""
        found += _loaded([s for s in summary.sustained if s.device == device], where)
    return element("div", *found, class_="plots") if found else Html()


def _loaded(found: Sequence[Sustained], where: str) -> Iterable[Html]:
    for stage in ("decode_rate", "first_token", "end_to_end"):
        title = f"{STAGES[stage].title}, {STAGES[stage].unit}"
        lines = [Curve(s.label, _points(s.curves[stage].points)) for s in found if stage in s.curves]
        yield from _curves(
            lines, ("minute", title), f"Under load{where}: {STAGES[stage].title}", f"{title}, each minute's median"
        )


def _points(found: Iterable[tuple[int, float]]) -> tuple[tuple[float, float], ...]:
    return tuple((minute + 1.0, value) for minute, value in found)


def anchors(summary: Summary) -> Html:
    """The machine's own speed through the run, as a share of its first."""
    groups: dict[tuple[str, int], list[Anchor]] = {}
    for anchor in summary.anchors:
        groups.setdefault((anchor.device, anchor.ceiling.threads), []).append(anchor)
    found = [f for (device, threads), group in groups.items() for f in _anchors(device, threads, group)]
    return element("div", *found, class_="plots") if found else Html()


def _anchors(device: str, threads: int, found: Sequence[Anchor]) -> Iterable[Html]:
    if len(found) < 2:
        return
    first = found[0].ceiling
    lines = [Curve("bandwidth", tuple((a.minute, 100 * a.ceiling.bandwidth / first.bandwidth) for a in found))]
    for kind, rate in first.gemm.items():
        if rate > 0 and all(kind in a.ceiling.gemm for a in found):
            lines.append(Curve(f"{kind} products", tuple((a.minute, 100 * a.ceiling.gemm[kind] / rate) for a in found)))
    sentence = f"{device}, {threads} thread{'s' * (threads > 1)}: what it can do, in percent of the first measurement"
    yield from _curves(
        lines, ("minute", "percent of the first"), "The machine through the run", sentence, (90.0, 105.0)
    )


def _curves(
    found: Sequence[Curve], names: tuple[str, str], title: str, sentence: str, least: Sequence[float] = ()
) -> Iterable[Html]:
    """Plots of at most so many lines as there are colours; their scale begins at 0, or holds `least`."""
    for start in range(0, len(found), curves.MOST):
        lines = found[start : start + curves.MOST]
        x = linear_axis((x for line in lines for x, _ in line.points), zero=False)
        y = linear_axis([*(y for line in lines for _, y in line.points), *least], zero=not least)
        spoken = "; ".join(f"{c.label} from {number(c.points[0][1])} to {number(c.points[-1][1])}" for c in lines)
        legend = plot.legend((curves.colour(i), line.label) for i, line in enumerate(lines))
        yield plot.figure(title, sentence, join(legend, curves.curves(lines, x, y, names, title, spoken)))


def _state(row: Row) -> str:
    return "bad" if row.disagrees else "plain"


def _top1(row: Row) -> float:
    return row.agreement.top1 if row.agreement else 0.0
