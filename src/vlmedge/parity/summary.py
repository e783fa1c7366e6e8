"""What a report says, in words and rows of text: the same on the page and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vlmedge.limits import Against
from vlmedge.parity.report import AGAINST, TITLES, Report, StageResult, TokenResult
from vlmedge.webpage.numbers import number, share, size

CHECKS: Final = "Checks"
GROUPS: Final[dict[Against | None, str]] = {None: CHECKS, "stored": "Stored weights", "original": "Original"}
# What `StageResult.numbers` holds, as a reader names it. Other keys keep their own name.
_NUMBERS: dict[str, tuple[str, Callable[[float], str]]] = {
    "kl_mean": ("mean KL", lambda v: f"{number(v)} nats"),
    "kl_p99": ("99th percentile of KL", lambda v: f"{number(v)} nats"),
    "top1": ("top-1 agreement", share),
    "positions": ("positions", number),
    "first_divergence": ("first other token at position", number),
    "iou": ("mean IoU", number),
    "iou_least": ("smallest IoU", number),
    "steps_rms": ("worst group, RMS in steps of its grid", number),
    "steps_most": ("largest error in steps of its grid", number),
    "equal": ("of them equal", number),
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """The first thing to read: "good", "bad" or "warn" (nothing was judged) as `state`, a word, and why."""

    state: str
    word: str
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """The teacher-forced positions of one answer to one picture and question."""

    name: str
    tokens: tuple[TokenResult, ...]

    @property
    def others(self) -> list[TokenResult]:
        """Positions at which the export chooses another token, near ties included."""
        return [t for t in self.tokens if t.token != t.reference_token]

    @property
    def worst(self) -> float:
        """The largest KL divergence, in nats; infinite where one is no number."""
        return max(math.inf if math.isnan(t.kl) else t.kl for t in self.tokens)

    def sentence(self) -> str:
        """How it went, in a line."""
        ties = sum(t.ambiguous for t in self.others)
        differ = f"{len(self.others)} with another token" if self.others else "the same token at each"
        aside = f" ({ties} at near ties)" if ties else ""
        count = f"{len(self.tokens)} position{'s' if len(self.tokens) > 1 else ''}"
        return f"{count}, {differ}{aside}; largest KL {number(self.worst)} nats."


def verdict(report: Report) -> Verdict:
    """Passed or failed, at which stage, why, and what usually causes it."""
    if report.failing is not None:
        return _failed(report.stages[report.failing], report.cause)
    passed = sum(s.outcome == "passed" for s in report.stages)
    counts = ((sum(s.outcome == o for s in report.stages), o) for o in ("measured", "skipped"))
    rest = "".join(f", {count} {outcome}" for count, outcome in counts if count)
    if not passed:
        return Verdict("warn", "Nothing was judged", (f"No check was held against a limit{rest}.",))
    checks = "The one check passed" if passed == 1 else f"All {passed} checks passed"
    lines = [f"{checks}{rest}."]
    if not report.close:
        share = 1 - (report.agreement or 0.0)
        lines.append(f"A right export, but {share:.0%} of the words differ from the original's: too few bits for it.")
        return Verdict("warn", "Right, and far from the original", tuple(lines))
    against = "original" if report.agreement is not None else "stored"
    ties = sum(s.ambiguous for s in report.stages if s.against == against)
    if ties:
        lines.append(f"{ties} choice{' differs' if ties == 1 else 's differ'} at near ties, which may go either way.")
    return Verdict("good", "Passed", tuple(lines))


def title(name: str) -> str:
    """A stage's name for a reader."""
    return TITLES.get(name, name)


def key_numbers(report: Report) -> list[tuple[str, str]]:
    """What a buyer of the bundle asks first: agreement with the original, size, time."""
    found = {key: value for s in report.stages if s.against == "original" for key, value in (s.numbers or {}).items()}
    others = [t.index for t in report.tokens if t.token != t.reference_token]
    if report.tokens:
        found.setdefault("top1", 1 - len(others) / len(report.tokens))
        found.setdefault("kl_mean", sum(t.kl for t in report.tokens) / len(report.tokens))
    if others:
        found.setdefault("first_divergence", float(min(others)))
    shown = [
        (_NUMBERS[k][0], _NUMBERS[k][1](found[k])) for k in ("top1", "kl_mean", "first_divergence", "iou") if k in found
    ]
    return [
        *((f"{name}, with the original" if name == "top-1 agreement" else name, value) for name, value in shown),
        ("size", size(report.bytes)),
        ("bits per weight", number(report.bits_per_weight)),
    ]


def details(result: StageResult, *, errors: bool = False) -> str:
    """The reason and the other numbers of a stage in one line; with `errors` also those that have columns elsewhere."""
    words = [result.why] if result.why else []
    if errors and result.relative_rms is not None:
        limit = f" (limit {number(result.limit)})" if result.limit is not None else ""
        words.append(f"relative RMS {number(result.relative_rms)}{limit}")
    if errors and result.max_abs is not None:
        words.append(f"max abs {number(result.max_abs)}")
    for key, value in (result.numbers or {}).items():
        name, show = _NUMBERS.get(key, (key.replace("_", " "), number))
        words.append(f"{name} {show(value)}")
    if result.ambiguous:
        words.append(f"{result.ambiguous} near tie{'s' if result.ambiguous > 1 else ''}")
    return "; ".join(words)


def readings(report: Report) -> list[Reading]:
    """The positions answer by answer; those that differ most come first."""
    groups: dict[str, list[list[TokenResult]]] = {}
    for token in report.tokens:
        answers = groups.setdefault(token.reading, [[]])
        if answers[-1] and token.index <= answers[-1][-1].index:  # the next answer of the same reading
            answers.append([])
        answers[-1].append(token)
    found = [
        Reading(f"{name}, answer {i}" if len(answers) > 1 else name, tuple(tokens))
        for name, answers in groups.items()
        for i, tokens in enumerate(answers, 1)
    ]
    return sorted(found, key=lambda r: (-sum(not t.ambiguous for t in r.others), -len(r.others), -r.worst))


def comparisons(report: Report) -> list[tuple[str, str]]:
    """What was compared with what, and why the limits are what they are."""
    found: list[tuple[str, str]] = []
    for against in ("stored", "original"):
        if any(s.against == against for s in report.stages):
            limits = report.limits.get(against, "")
            found.append((GROUPS[against], f"{AGAINST[against]}{f' Limits: {limits}' if limits else ''}"))
    found += [(name, f"Limits: {why}") for name, why in report.limits.items() if name not in AGAINST]
    return found


def facts(report: Report) -> list[tuple[str, str]]:
    """What was verified, with what, where, and what it took."""
    peak = report.peak_rss_mb
    return [
        ("bundle", report.bundle),
        ("family", report.family),
        ("format", f"{report.format} ({report.flavour})" if report.flavour else report.format),
        ("profile", f"{report.profile}, {number(report.bits_per_weight)} bits per weight"),
        ("size", f"{size(report.bytes)} ({report.bytes:,} bytes)"),
        ("runtime", report.runtime),
        ("original", report.source),
        ("pictures", str(report.pictures)),
        ("took", f"{number(report.seconds)} s"),
        (
            "peak memory",
            "unknown" if peak is None else size(round(peak * 1e6)) if math.isfinite(peak) else number(peak),
        ),
        *report.environment.items(),
    ]


def _failed(result: StageResult, cause: str) -> Verdict:
    why = f"Why: {result.why or _excess(result)}"
    scope = f"Compared with {AGAINST[result.against]}" if result.against else ""
    usual = f"Usual cause: {cause}" if cause else ""
    return Verdict("bad", f"Failed at {title(result.stage)}", tuple(filter(None, (why, usual, scope))))


def _excess(result: StageResult) -> str:
    if result.relative_rms is None or result.limit is None:
        return "the report does not say"
    return f"relative RMS is {number(result.relative_rms)}, at most {number(result.limit)} is allowed"
