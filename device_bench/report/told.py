"""What the report says in words: its verdict, its key numbers, what was run, and how everything is meant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from vlmedge.device_bench.report.chosen import CALM
from vlmedge.device_bench.report.rows import TOP1_LEAST, Row
from vlmedge.device_bench.report.stages import STAGES
from vlmedge.device_bench.report.statistics import DRAWS
from vlmedge.device_bench.report.summary import Summary
from vlmedge.device_bench.report.tables import measured, name
from vlmedge.webpage.numbers import number, share, size

_FEW = 3  # reasons in the verdict
# What the fastest is found by: the first of these that any row has.
RANKED: Final = ("end_to_end", "first_token", "decode")


@dataclass(frozen=True, slots=True)
class Verdict:
    """The one thing to read: "good", "warn" or "bad", a word and a few lines."""

    state: str
    word: str
    lines: tuple[str, ...]


def verdict(summary: Summary) -> Verdict:
    """The fastest row that agrees with the original, and how many rows are no competition."""
    right = trusted(summary)
    wrong = tuple(_wrong(summary))
    if not right:
        lines = (*wrong, *_reasons(summary))
        return Verdict("bad" if wrong or not summary.sustained else "good", _nothing(summary), lines)
    stage = next(stage for stage in RANKED if any(stage in row.stages for row in right))
    best = min((row for row in right if stage in row.stages), key=lambda r: r.stages[stage].median)
    near = [name(row, summary) for row in right if row is not best and _may_be_as_fast(row, best, stage)]
    alike = (f"Perhaps as fast, the intervals overlap: {', '.join(near)}.",) if near else ()
    lines = (_speed(best), *alike, *_beside(best), *_agreeing(best), *wrong, *_restless(best))
    doubtful = wrong or best.agreement is None or not best.calm
    return Verdict("warn" if doubtful else "good", f"{_word(best)}: {name(best, summary)}", lines)


def trusted(summary: Summary) -> list[Row]:
    """The rows that have answers which agree; all that have answers where nothing was compared."""
    found = [row for row in measured(summary) if any(stage in row.stages for stage in RANKED)]
    compared = any(row.agreement for row in found)
    return [row for row in found if not row.disagrees and (row.agreement or not compared)]


def key_numbers(summary: Summary) -> list[tuple[str, str]]:
    """The best of the rows that agree, each by itself."""
    right = trusted(summary)
    found = []
    for stage, sign in (("first_token", 1), ("decode_rate", -1), ("end_to_end", 1)):
        known = [(sign * row.stages[stage].median, row) for row in right if stage in row.stages]
        if known:
            best = min(known, key=lambda k: k[0])[1]
            middle, unit = best.stages[stage].median, STAGES[stage].unit
            value = _ms(middle) if unit == "ms" else f"{number(middle)} {unit}"
            found.append((f"{STAGES[stage].title}, at best", f"{value}\n{name(best, summary)}"))
    known = [(row.memory["peak"].median, row) for row in right if "peak" in row.memory]
    if known:
        peak, best = min(known, key=lambda k: k[0])
        found.append(("peak memory, at best", f"{size(round(peak * 1e6))}\n{name(best, summary)}"))
    total = len(summary.rows) + sum(row.asked for row in summary.unavailable)
    return [*found, ("variants measured", f"{len(measured(summary))} of {total}")] if total else found


def where(summary: Summary) -> str:
    """When, on what, with which version, in one line."""
    told = [summary.started[:10], *summary.devices]
    for key in ("cpu", "system"):
        told += [str(e[key]) for e in summary.environments.values() if isinstance(e.get(key), str)]
    versions = (e.get("vlmedge") for e in summary.environments.values())
    told += [f"vlmedge {version}" for version in versions if isinstance(version, str)]
    return " \u00b7 ".join(dict.fromkeys(told))


def facts(summary: Summary) -> list[tuple[str, str]]:
    """What was run, where and when."""
    work = summary.work
    warm = f"{_of(work.warmup, 'answer')} for warm-up, then " if work.warmup else ""
    again = f", and on until {number(work.min_seconds)} s are over" if work.min_seconds else ""
    rounds = max((sum(row.statuses.values()) for row in summary.rows), default=0)
    repeats = f"{_of(rounds, 'process')} of each variant; in each, {warm}every question {work.repeat}\u00d7{again}"
    return [
        ("scenario", f"{work.scenario}: {_of(len(work.asks), 'question')}, {work.tokens} tokens each"),
        *([("repeats", repeats)] if rounds else []),
        ("devices", ", ".join(d if d == host else f"{d} ({host})" for d, host in summary.devices.items())),
        ("date", f"{summary.started.replace('T', ' ').replace('+00:00', '')} UTC, {_minutes(summary.minutes)}"),
        ("run", ", ".join(summary.runs)),
    ]


def machine(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a process told of its machine, empty values left out."""
    units = {"mb": "MB", "mhz": "MHz"}
    words = {key: " ".join(units.get(w, w) for w in str(key).split("_")) for key in environment}
    return [(words[key], text) for key, value in environment.items() if (text := _words(value))]


def meanings(summary: Summary) -> list[tuple[str, str]]:
    """How every number is made, of those that the run has."""
    present = {stage for row in measured(summary) for stage in row.stages}
    stages = [(stage.title, stage.meaning) for key, stage in STAGES.items() if key in present]
    return [*stages, *_MEANINGS]


_MEANINGS: Final = (
    (
        "medians and intervals",
        "Over all questions: the mean of the questions' medians. The 95 % interval is a bootstrap: processes are drawn "
        f"with replacement, then samples within each ({DRAWS} draws), and it is as wide as Student's t is of so many "
        "processes. In simulation it held the truth in 8 of 10 cases with three processes, in 9 or more with five. Of "
        "a single process it knows nothing of how processes differ.",
    ),
    (
        "KL",
        "Mean Kullback-Leibler divergence of the next token's distribution along the original's tokens, in nats, from "
        "the original's 64 most likely tokens and the rest. 0: the same distribution.",
    ),
    ("percentiles", "Interpolated linearly between the sorted samples (type 7 of Hyndman and Fan); questions pooled."),
    ("calm", CALM),
    (
        "memory",
        "Of the worker's own process, in MB of 10^6 bytes. Before opening: libraries imported. Anonymous memory cannot "
        "be dropped, mapped pages of files can; both at the end.",
    ),
    (
        "top-1",
        "Along the tokens of the original's float32 answers: at how many positions the model's best token is the "
        f"original's. Below {share(TOP1_LEAST)} a row is marked and never named fastest.",
    ),
    ("same answers", "How many whole answers are equal, token by token, up to the first stop token."),
    (
        "ceiling",
        "Bandwidth of a streaming read and rate of matrix products, measured in the run with as many threads. A token "
        "reads all weights and the KV cache once: the bandwidth over these bytes is the decode rate at most.",
    ),
)


def _word(best: Row) -> str:
    if best.agreement is None:
        return "Fastest, not compared with an original"
    return "Nothing that agrees is faster than the original" if best.variant.is_original else "Fastest that agrees"


def _wrong(summary: Summary) -> Iterable[str]:
    failed = [f"{name(r, summary)}{_how_often(r)}" for r in summary.rows if r.failed]
    if failed:
        yield f"Failed: {', '.join(failed)}."
    other = [name(r, summary) for r in summary.rows if r.disagrees]
    if other:
        yield f"Says something else than the original: {', '.join(other)}."


def _may_be_as_fast(row: Row, best: Row, stage: str) -> bool:
    if stage not in row.stages:
        return False
    low, high = row.stages[stage].low, best.stages[stage].high
    return low is not None and high is not None and low <= high


def _restless(best: Row) -> Iterable[str]:
    if not best.calm:
        yield "The machine had other things to do meanwhile: a calm one may rank them otherwise."


def _how_often(row: Row) -> str:
    total = sum(row.statuses.values())
    return "" if row.failed == total else f" ({row.failed} of {total} processes)"


def _nothing(summary: Summary) -> str:
    if any(r.disagrees for r in summary.rows):
        return "Nothing that was measured agrees with the original"
    return "Measured under load only" if summary.sustained else "Nothing was measured"


def _reasons(summary: Summary) -> Iterable[str]:
    """Why there is nothing, of the first few that have no numbers."""
    idle = [row for row in (*summary.rows, *summary.unavailable) if row.asked and not row.stages and row.reasons]
    return (f"{name(row, summary)}: {row.reasons[0]}" for row in idle[:_FEW])


def _speed(row: Row) -> str:
    middle = {stage: found.median for stage, found in row.stages.items()}
    told = [
        *([f"an answer takes {_ms(middle['end_to_end'])}"] if "end_to_end" in middle else []),
        *([f"the first token comes after {_ms(middle['first_token'])}"] if "first_token" in middle else []),
        *([f"then {number(middle['decode_rate'])} tokens/s"] if "decode_rate" in middle else []),
    ]
    text = ", ".join(told)
    return f"{text[:1].upper()}{text[1:]}."


def _agreeing(row: Row) -> Iterable[str]:
    if row.agreement and not row.variant.is_original:
        yield (
            f"{share(row.agreement.top1)} of its best tokens are the original's, "
            f"{share(row.agreement.same_answers)} of its answers are the same."
        )


def _beside(row: Row) -> Iterable[str]:
    for against in row.against:
        ratio = against.ratios.get("end_to_end")
        if ratio and ratio.value > 0:
            speed = f"{1 / ratio.value:.2g} times as fast as {against.label}"
            memory = against.ratios.get("peak")
            yield f"{speed}, with {share(memory.value)} of its memory." if memory else f"{speed}."


def _minutes(value: float) -> str:
    return f"{number(value)} minutes" if value < 100 else f"{int(value // 60)} h {int(value % 60)} min"


def _of(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}{'es' if thing.endswith('s') else 's'}"


def _ms(value: float) -> str:
    return f"{number(value / 1000)} s" if value >= 1000 else f"{number(value)} ms"


def _words(value: Any) -> str:
    """JSON data in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_words, value))
    if value is None or isinstance(value, bool):
        return "yes" if value else "no" if value is False else ""
    return str(value)
