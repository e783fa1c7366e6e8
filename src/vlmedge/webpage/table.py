"""A table that scrolls sideways inside its own box, so that the page never does."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from vlmedge.webpage.markup import Html, element


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its heading, "number" (to the right) or "" as `kind`, and the heading above it."""

    title: str
    kind: str = ""
    group: str = ""


def table(
    columns: Sequence[Column], rows: Iterable[Sequence[str]], caption: str, bad: int | Collection[int] | None = None
) -> Html:
    """A table; the first cell of a row is its heading and stays in sight, row number `bad`, or several, highlighted.

    Cells are text or markup; every row has one for each column.
    """
    edges = {i for i, c in enumerate(columns) if c.group and c.group != columns[i - 1].group}
    marked = () if bad is None else (bad,) if isinstance(bad, int) else bad
    body = [_row(columns, row, edges, i in marked) for i, row in enumerate(rows)]
    parts = (
        element("caption", element("span", caption)),
        element("thead", *_head(columns, edges)),
        element("tbody", *body),
    )
    return element("div", element("table", *parts), class_="scroll", role="region", aria_label=caption, tabindex=0)


def _head(columns: Sequence[Column], edges: set[int]) -> list[Html]:
    titles = [element("th", c.title, scope="col", class_=_class(c, i in edges)) for i, c in enumerate(columns)]
    if not edges:
        return [element("tr", *titles)]
    groups = []
    for group, members in groupby(columns, key=lambda c: c.group):
        scope = {"scope": "colgroup", "class_": "edge"} if group else {}
        groups.append(element("th" if group else "td", group, colspan=len(list(members)), **scope))
    return [element("tr", *groups), element("tr", *titles)]


def _row(columns: Sequence[Column], row: Sequence[str], edges: set[int], bad: bool) -> Html:
    cells = [
        element("td" if i else "th", cell, scope=None if i else "row", class_=_class(column, i in edges))
        for i, (column, cell) in enumerate(zip(columns, row, strict=True))
    ]
    return element("tr", *cells, class_="bad" if bad else None)


def _class(column: Column, edge: bool) -> str | None:
    return " ".join(filter(None, (column.kind, "edge" if edge else ""))) or None
