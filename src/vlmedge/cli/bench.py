"""vlmedge bench: what models cost on a device, beside each other and the original."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from vlmedge.cli.bench_reports import compare, devices, report
from vlmedge.cli.console import json_option, one_of, print_json, print_table, quiet_option, shown, threads_option
from vlmedge.cli.options import pickle_option
from vlmedge.errors import UsageError, VlmedgeError
from vlmedge.webpage.markup import printable

if TYPE_CHECKING:
    from vlmedge.device_bench.report.summary import Summary

RUN = "run"
_LESS = ("same\nanswers", "of the\nbandwidth", "size")  # columns that a narrow terminal does without


class _StoppedError(VlmedgeError):
    """Ctrl-C, which costs one job at most."""

    exit_code = 130


def _processors(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    """Numbers from a list such as 0,2-3."""
    if value is None:
        return ()
    ends = [part.partition("-") for part in value.split(",")]
    if not all(first.isdecimal() and (last.isdecimal() or not dash) for first, dash, last in ends):
        raise UsageError(f"--affinity takes processors such as 0,2-3, not '{value}'")
    found = {n for first, dash, last in ends for n in range(int(first), int(last if dash else first) + 1)}
    return tuple(sorted(found))


class _Bench(click.Group):
    """`vlmedge bench SOURCE...` measures; a few words in the place of the first source do something else."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the word for measuring in front where none of the others stands there."""
        helped = any(arg in ctx.help_option_names for arg in args)
        if not args or args[0] not in self.commands:
            args = list(ctx.help_option_names[:1]) if helped else [RUN, *args]
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Measuring has no word of its own in messages, as it needs none on the command line."""
        name, found, rest = super().resolve_command(ctx, args)
        return "" if name == RUN else name, found, rest

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The usage of measuring, and of the rest."""
        formatter.write_usage(ctx.command_path, "SOURCE... [OPTIONS]")
        formatter.write_usage(ctx.command_path, f"{'|'.join(n for n in self.commands if n != RUN)} ...")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options of measuring, and the other words."""
        self.commands[RUN].format_options(ctx, formatter)
        rows = [(name, command.get_short_help_str(80)) for name, command in self.commands.items() if name != RUN]
        with formatter.section("Instead of a source"):
            formatter.write_dl(rows)


@click.group("bench", cls=_Bench)
def command() -> None:
    """Measure each SOURCE (a bundle, or a checkpoint) on the same pictures: latency, memory, energy, agreement.

    Every job is a fresh process; the models take turns. What was measured is kept as it comes: the same command goes on
    where it stopped.
    """


@click.command(RUN)
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option("--original", metavar="CHECKPOINT", help="Measure it too, and count agreement with it.")
@click.option(
    "--device", "devices", multiple=True, metavar="NAME|TOML", help="Where; NAME@ADDRESS reaches one [default: local]."
)
@click.option("--scenario", default="standard", show_default=True, metavar="NAME|TOML", help="Pictures and questions.")
@click.option("--runtime", metavar="NAME", help="Of bundles [default: the one for the format].")
@click.option("--unit", "units", multiple=True, metavar="NAME", help="What computes [default: all there are].")
@click.option(
    "--rounds", type=click.IntRange(1), metavar="N", help="Processes of each model [default: the scenario's]."
)
@click.option(
    "--repeat", type=click.IntRange(1), metavar="N", help="Answers of each process [default: the scenario's]."
)
@click.option("--min-seconds", type=click.FloatRange(0), metavar="S", help="... and go on for so long.")
@click.option("--tokens", type=click.IntRange(2), metavar="N", help="Tokens of an answer [default: the scenario's].")
@click.option("--timeout", type=click.FloatRange(1), default=600, show_default=True, metavar="S", help="Of one job.")
@click.option("--affinity", callback=_processors, metavar="N,N-N", help="Use these processors only [default: all].")
@click.option("--context", type=click.IntRange(1), metavar="N", help="Positions to keep memory for [default: all].")
@click.option(
    "--memory", callback=one_of("fast", "lean"), default="fast", show_default=True, metavar="fast|lean", help="Weights."
)
@click.option("--tune", callback=one_of("threads"), metavar="threads", help="Find the best thread count first.")
@click.option(
    "--sustained", type=click.FloatRange(0.1), metavar="MINUTES", help="Then measure each for so long without a pause."
)
@click.option("--out", metavar="DIR", help="Keep the records here, and go on from them [default: bench-...].")
@click.option("--ray", metavar="ADDRESS", help="On every node of a Ray cluster (extra 'ray').")
@pickle_option
@threads_option
@quiet_option
@json_option
def run(
    sources: tuple[str, ...],
    devices: tuple[str, ...],
    units: tuple[str, ...],
    tune: str | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure, write the reports, and print the table."""
    from vlmedge.device_bench.bench import bench

    try:
        with shown(quiet or as_json) as progress:
            found = bench(
                sources, devices=devices or ("local",), units=units, tune=tune is not None, progress=progress, **options
            )
    except KeyboardInterrupt:
        raise _StoppedError("interrupted; what was measured is kept: the same command goes on from there") from None
    from vlmedge.device_bench.report.summary import summarise

    summary = summarise(found.records)
    if as_json:
        print_json({"folder": str(found.folder), **summary.as_dict()})
    else:
        _print(summary)
        click.echo(f"report: {found.folder / 'report.html'}")
    if not any(row.stages for row in summary.rows):
        reasons = [reason for row in (*summary.rows, *summary.unavailable) for reason in row.reasons]
        raise VlmedgeError(f"nothing could be measured: {reasons[0] if reasons else 'no model to run'}")


def _print(summary: Summary) -> None:
    """The table of results as far as the terminal is wide, the fastest, and what a reader must know."""
    from rich.console import Console

    from vlmedge.device_bench.report.tables import results
    from vlmedge.device_bench.report.told import verdict

    table, console = results(summary), Console()
    columns, rows = table.columns, table.rows
    if console.is_terminal and console.width < _width(columns, rows):
        rows = tuple(tuple(cell.split("\n")[0] for cell in row) for row in rows)
    if console.is_terminal and console.width < _width(columns, rows):
        kept = [i for i, title in enumerate(columns) if title not in _LESS and (i != 1 or table.bad)]
        columns, rows = tuple(columns[i] for i in kept), tuple(tuple(row[i] for i in kept) for row in rows)
    if rows:
        print_table("", columns, rows, right=[title for title in columns if title not in ("variant", "state")])
    click.echo(printable(verdict(summary).word))
    for line in summary.notes:
        click.echo(f"- {printable(line)}")


def _width(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """How wide a table is, its margins included."""
    cells = ([line for cell in column for line in cell.split("\n")] for column in zip(columns, *rows, strict=True))
    return 1 + sum(max(map(len, column)) + 3 for column in cells)


for _verb in (run, compare, report, devices):
    command.add_command(_verb)
