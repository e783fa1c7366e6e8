"""A verification as one HTML file: the verdict first, then every number behind it."""

from __future__ import annotations

from itertools import islice

from vlmedge.limits import Against
from vlmedge.parity import parts, summary
from vlmedge.parity.report import Report, StageResult, TokenResult
from vlmedge.parity.summary import GROUPS, Reading
from vlmedge.webpage import page, plot
from vlmedge.webpage.markup import Html, element, join
from vlmedge.webpage.numbers import number
from vlmedge.webpage.scale import LogAxis, log_axis
from vlmedge.webpage.table import Column, table

_PILLS = {"passed": "good", "failed": "bad", "measured": "plain", "skipped": "plain"}
_OPEN = 4  # readings in sight; up to _FOLDED more open on a click, the JSON report has all
_FOLDED = 20
_LISTED = 20  # other tokens; more than _SHORT open on a click
_SHORT = 5
_ERRORS = "Norm of the difference over the norm of the reference. The tick is the limit; further left is better."
_POSITIONS = (
    "The original reads the export's own tokens, and at each position both say what comes next. KL divergence tells "
    "how far apart the two predictions are; lower is better."
)
_MARKS = (("plain", "same token"), ("warn", "near tie: may go either way"), ("bad", "another token"))


def render(report: Report) -> str:
    """The text of the HTML file; it needs no network, no script and no other file."""
    found = summary.verdict(report)
    return page.document(
        f"{found.word}: {report.bundle}",
        element("header", element("p", "vlmedge verify", class_="soft small"), element("h1", report.bundle)),
        page.verdict(found.state, found.word, found.lines),
        page.tiles(summary.key_numbers(report)),
        page.section("Stage by stage", _stages(report), _more(report), _checks(report)),
        page.section("Errors and limits", _errors(report)),
        page.section("Token by token", _tokens(report)),
        page.section("What each part costs", _parts(report)),
        page.section("What was compared", _comparisons(report)),
        page.section("Notes", page.points(report.notes)),
        page.section("Facts", page.facts(summary.facts(report))),
        element("footer", "Written by vlmedge verify. The same numbers as data: --report FILE.json."),
    )


def _stages(report: Report) -> Html:
    """One row per stage, the columns of a comparison side by side."""
    present = [a for a in GROUPS if a is not None and any(s.against == a for s in report.stages)]
    names = list(dict.fromkeys(s.stage for s in report.stages if s.against is not None))
    if not names:
        return Html()
    titles = (("", ""), ("relative RMS", "number"), ("limit", "number"), ("max abs", "number"))
    columns = [Column("stage"), *(Column(t or "outcome", kind, GROUPS[a]) for a in present for t, kind in titles)]
    found = {(s.stage, s.against): s for s in report.stages}
    rows = [_row(name, [found.get((name, a)) for a in present]) for name in names]
    failed = report.stages[report.failing] if report.failing is not None else None
    bad = names.index(failed.stage) if failed and failed.against else None
    return table(columns, rows, "Stages of the model, in the order in which a picture and a question go through", bad)


def _row(name: str, results: list[StageResult | None]) -> list[str]:
    cells: list[str] = [summary.title(name)]
    for result in results:
        cells += _numbers(result) if result else [""] * 4
    return cells


def _more(report: Report) -> Html:
    """What the table of stages has no column for: KL, agreement, IoU, reasons."""
    told = ((s, summary.details(s)) for s in report.stages if s.against is not None)
    found = [(f"{summary.title(s.stage)}, {GROUPS[s.against].lower()}", text) for s, text in told if text]
    return page.facts(found) if found else Html()


def _numbers(result: StageResult) -> list[str]:
    return [_outcome(result), *(number(v) for v in (result.relative_rms, result.limit, result.max_abs))]


def _outcome(result: StageResult) -> Html:
    return page.pill(_PILLS[result.outcome], result.outcome)


def _checks(report: Report) -> Html:
    """What needs no comparison of models: hashes, facts, prompts, preprocessing, stored weights."""
    checks = [s for s in report.stages if s.against is None]
    rows = [(summary.title(s.stage), join(_outcome(s), " ", summary.details(s, errors=True))) for s in checks]
    return join(element("h3", "Checks of the files"), page.facts(rows)) if rows else Html()


def _errors(report: Report) -> Html:
    """A plot per comparison, all on one axis."""
    shown = [s for s in report.stages if s.relative_rms is not None]
    axis = log_axis(v for s in shown for v in (s.relative_rms, s.limit) if v is not None)
    plots = [_bars(a, [s for s in shown if s.against == a], axis) for a in sorted(GROUPS, key=lambda a: a is None)]
    if not any(plots):
        return Html()
    sentence = element("p", _ERRORS, class_="soft small")
    return join(sentence, plot.legend([("limit", "limit")]), element("div", *plots, class_="plots"))


def _bars(against: Against | None, results: list[StageResult], axis: LogAxis) -> Html:
    if not results:
        return Html()
    rows = [
        plot.Bar(summary.title(s.stage), s.relative_rms, s.limit, _PILLS[s.outcome], _beside(s))
        for s in results
        if s.relative_rms is not None
    ]
    spoken = "; ".join(f"{summary.title(s.stage)} {_beside(s)}, {s.outcome}" for s in results)
    name = GROUPS[against]
    return plot.figure(name, "relative RMS", plot.bars(rows, axis, f"Relative RMS by stage: {name}", spoken))


def _beside(result: StageResult) -> str:
    limit = "" if result.limit is None else f", limit {number(result.limit)}"
    return f"{number(result.relative_rms)}{limit}"


def _tokens(report: Report) -> Html:
    """A plot per reading, the worst first; then every position that differs."""
    found = summary.readings(report)
    if not found:
        return Html()
    axis = log_axis(t.kl for t in report.tokens)
    plots = [_dots(reading, axis) for reading in islice(found, _OPEN + _FOLDED)]
    shown, more = plots[:_OPEN], plots[_OPEN:]
    rest = len(found) - len(plots)
    further = f"{len(more)} more{f', and {rest} in the JSON report' if rest else ''}"
    folded = element("div", *more, class_="plots") if more else Html()
    return join(
        element("p", _POSITIONS, class_="soft small"),
        plot.legend(_MARKS),
        element("div", *shown, class_="plots"),
        page.folded(further, folded),
        _others(found),
    )


def _dots(reading: Reading, axis: LogAxis) -> Html:
    found = [plot.Dot(t.index, t.kl, _state(t), _note(t)) for t in reading.tokens]
    sentence = reading.sentence()
    return plot.figure(reading.name, sentence, plot.dots(found, axis, f"KL by position: {reading.name}", sentence))


def _state(token: TokenResult) -> str:
    return "warn" if token.ambiguous else "bad" if token.token != token.reference_token else "plain"


def _note(token: TokenResult) -> str:
    instead = f" instead of {token.reference_token}" if token.token != token.reference_token else ""
    return f"position {token.index}: token {token.token}{instead}, KL {number(token.kl)} nats"


def _others(found: list[Reading]) -> Html:
    """The positions at which another token was chosen."""
    others = [(reading.name, t) for reading in found for t in reading.others]
    if not others:
        return Html()
    titles = ("position", "export's token", "original's token", "KL, nats", "margin")
    columns = [Column("reading"), *(Column(t, "number") for t in titles), Column("near tie")]
    rows = [
        [
            name,
            *(str(v) for v in (t.index, t.token, t.reference_token)),
            *(number(v) for v in (t.kl, t.margin)),
            page.pill("warn", "near tie") if t.ambiguous else "no",
        ]
        for name, t in others[:_LISTED]
    ]
    of = f"; the first {_LISTED} of {len(others)}" if len(others) > _LISTED else ""
    caption = f"Positions with another token{of}. Margin: how much higher the original rates its own"
    listed = table(columns, rows, caption)
    return listed if len(rows) <= _SHORT else page.folded(f"{len(others)} positions with another token", listed)


def _parts(report: Report) -> Html:
    """A table of the parts, and their KL as bars."""
    if not report.parts:
        return Html()
    axis = log_axis(cost for _, cost in parts.costs(report))
    rows = [plot.Bar(name, cost, None, "plain", number(cost)) for name, cost in parts.costs(report)]
    spoken = "; ".join(f"{name} {number(cost)}" for name, cost in parts.costs(report))
    listed = table([Column("part"), *(Column(t, "number") for t in parts.columns(report))], parts.rows(report), "Parts")
    bars = plot.figure("KL divergence", "nats, mean", plot.bars(rows, axis, "KL divergence by part", spoken))
    return join(element("p", parts.sentence(report), class_="soft small"), listed, element("div", bars, class_="plots"))


def _comparisons(report: Report) -> Html:
    found = summary.comparisons(report)
    return page.facts(found) if found else Html()
