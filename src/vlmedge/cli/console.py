"""What commands show: progress and notes on stderr, tables and one JSON object on stdout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from vlmedge.errors import nearest
from vlmedge.progress import Progress

# Seconds over which the time left is estimated: one answer may take longer than rich's 30.
_SPEED_OVER = 600
F = TypeVar("F", bound=Callable[..., Any])


def json_option(function: F) -> F:
    """Add --json."""
    return click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON object on stdout.")(function)


def quiet_option(function: F) -> F:
    """Add --quiet."""
    return click.option("--quiet", "-q", is_flag=True, help="No progress on stderr.")(function)


def threads_option(function: F) -> F:
    """Add --threads."""
    return click.option("--threads", type=click.IntRange(1, 1024), help="Default: the physical cores.")(function)


def one_of(*words: str) -> Callable[[click.Context, click.Parameter, str | None], str | None]:
    """An option's callback: one of a few words; for any other the nearest is suggested."""

    def check(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
        if value is not None and value not in words:
            raise click.BadParameter(f"unknown word '{value}'{nearest(value, words)}", ctx, param)
        return value

    return check


def print_json(data: Any) -> None:
    """Print one JSON object."""
    click.echo(json.dumps(data, ensure_ascii=False))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Print a table; columns in `right` hold numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Text, not str: rich reads brackets in a str as markup, and names out of files may hold some.
    table = Table(title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console()
    # Piped output is for other programs: lines are not folded at an imagined width of 80.
    Console(width=None if console.is_terminal else 200).print(table)


@contextmanager
def shown(quiet: bool) -> Iterator[Progress]:
    """Draw progress on stderr, where that is a terminal, for the length of the block; silent with `quiet`."""
    if quiet:
        yield Progress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns: tuple[Any, ...] = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
    )
    columns += (TimeRemainingColumn(compact=True),)
    # In a log file bars are noise; notes appear there too.
    with Bars(
        *columns, console=console, transient=True, disable=not console.is_terminal, speed_estimate_period=_SPEED_OVER
    ) as bars:
        yield _Shown(bars)


class _Shown(Progress):
    """Progress as one rich bar, that of the stage at work; notes stay above it."""

    def __init__(self, bars: Any) -> None:
        self._bars = bars
        self._task: Any = None

    @property
    def quiet(self) -> bool:
        """The hub may draw its bars too."""
        return False

    def stage(self, text: str, total: int | None = None) -> None:
        """Start the stage's bar."""
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(text, total=total)

    def advance(self, steps: int) -> None:
        """Move the bar."""
        if self._task is not None:
            self._bars.advance(self._task, steps)

    def note(self, text: str) -> None:
        """Print a line above the bar; never folded, since it may end in a command to be copied."""
        self._bars.console.print(f"note: {text}", highlight=False, markup=False, soft_wrap=True)


def megabytes(count: float) -> str:
    """Bytes as MB (10^6)."""
    return f"{count / 1e6:,.1f} MB"


def short_number(value: float | None) -> str:
    """Two digits, such as 1.3e-02; "" where there is none."""
    return "" if value is None else f"{value:.1e}" if value else "0"
