"""A run as one HTML file: the verdict, the table, the plots, and how every number is made."""

from __future__ import annotations

from collections.abc import Sequence

from vlmedge.device_bench.report import figures, tables, told
from vlmedge.device_bench.report.chosen import last_tries
from vlmedge.device_bench.report.summary import Summary, by_row
from vlmedge.device_bench.report.tables import Listed
from vlmedge.device_bench.result import Record
from vlmedge.webpage import page
from vlmedge.webpage.markup import Html, element, join
from vlmedge.webpage.table import Column, table


def render(summary: Summary, records: Sequence[Record]) -> str:
    """The text of the HTML file; it needs no network, no script and no other file.

    `records` are those that the summary is of: their samples are drawn.
    """
    found, title = told.verdict(summary), f"Benchmark: {summary.work.scenario}"
    return page.document(
        title,
        element("header", element("p", "vlmedge bench", class_="soft small"), element("h1", title), _under(summary)),
        page.verdict(found.state, found.word, found.lines),
        page.tiles((title, _two_lines(value)) for title, value in told.key_numbers(summary)),
        page.section("Results", listed(tables.results(summary), state=True)),
        page.section("Failed", told_as_facts(tables.failures(summary))),
        page.section("Notes", page.points(summary.notes)),
        page.section("Beside the original", listed(tables.beside(summary))),
        page.section("Agreement", page.folded("Answer by answer", listed(tables.agreement(summary)))),
        page.section("Where the time goes", figures.breakdown(summary), *_stages(summary)),
        page.section("What the machine allows", figures.bounded(summary), listed(tables.ceilings(summary))),
        page.section("Speed, size, memory and accuracy", figures.against_size(summary)),
        page.section("Loading, memory, energy", listed(tables.costs(summary)), _energy(summary)),
        page.section("Threads", listed(tables.tuned(summary))),
        page.section("Under load", figures.under_load(summary), listed(tables.sustained(summary))),
        page.section("Every sample", figures.scattering(summary, by_row(last_tries(records))), _spread(summary)),
        page.section("The machine", figures.anchors(summary), *_machines(summary)),
        page.section("Not available", page.folded("Units and why", told_as_facts(tables.unavailable(summary)))),
        page.section("What was asked", listed(tables.questions(summary))),
        page.section("What was run", page.facts(told.facts(summary))),
        page.section("How it is measured", page.facts(told.meanings(summary))),
        element("footer", "Written by vlmedge bench. Every sample as data: records.jsonl; as a table: report.csv."),
        wide=True,
    )


def _under(summary: Summary) -> Html:
    return element("p", told.where(summary), class_="soft small")


def listed(found: Listed, *, state: bool = False) -> Html:
    """A table of the report; nothing where it has no rows. With `state` the second column goes below the first."""
    if not found.rows:
        return Html()
    columns = [Column(_two_lines(t), _kind(i, found)) for i, t in enumerate(found.columns)]
    rows = [[_two_lines(cell) for cell in row] for row in found.rows]
    if state:
        columns, rows = [columns[0], *columns[2:]], [[_with_state(r[0], r[1]), *r[2:]] for r in rows]
    return table(columns, rows, found.caption, found.bad)


def told_as_facts(found: Listed) -> Html:
    """A table of words as a list: a phone has no room for four columns of them."""
    facts = [(name, " \u00b7 ".join(filter(None, cells))) for name, *cells in found.rows]
    return page.facts(facts) if facts else Html()


def _kind(i: int, found: Listed) -> str:
    return "number" if i not in found.words else "words" if i else ""


def _with_state(label: str, state: str) -> str:
    return label if state == "ok" else join(label, element("span", page.pill("bad", state), class_="under"))


def _two_lines(text: str) -> str:
    first, _, second = text.partition("\n")
    if second.startswith("(") and second.endswith(")"):  # as Markdown has it, in one line
        second = second[1:-1]
    return join(first, element("span", second, class_="under")) if second else first


def _stages(summary: Summary) -> list[Html]:
    several = summary.work.asks if len(summary.work.asks) > 1 else ()
    asks = [listed(tables.stages(summary, ask.name)) for ask in several]
    by_question = page.folded("Question by question", join(*asks) if any(asks) else Html())
    return [listed(tables.stages(summary)), by_question]


def _spread(summary: Summary) -> Html:
    return page.folded("Percentiles", listed(tables.spread(summary)))


def _energy(summary: Summary) -> Html:
    notes = dict.fromkeys(row.energy_note for row in summary.rows if row.energy_note)
    return element("p", f"Energy: {'; '.join(notes)}.", class_="soft small") if notes else Html()


def _machines(summary: Summary) -> list[Html]:
    several = len(summary.environments) > 1
    found = []
    for device, environment in summary.environments.items():
        facts = told.machine(environment)
        found += [element("h3", device)] if several else []
        found += [page.facts(facts)] if facts else []
    return found
