"""vlmedge bench compare, report, devices: what is done with records, and which devices are known."""

from __future__ import annotations

from pathlib import Path

import click

from vlmedge.cli.console import json_option, print_json, print_table
from vlmedge.errors import UsageError, VlmedgeError


def _tolerance(_context: click.Context, _parameter: click.Parameter, value: str) -> float:
    """A share of 1 from 5% or 0.05."""
    try:
        share = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise UsageError(f"--tolerance takes a share such as 5% or 0.05, not '{value}'")
    return share


@click.command("compare")
@click.argument("before", metavar="A.jsonl")
@click.argument("after", metavar="B.jsonl")
@click.option(
    "--tolerance", callback=_tolerance, default="5%", show_default=True, metavar="SHARE", help="May be worse."
)
@click.option("--report", metavar="FILE.md", help="Write it as Markdown too.")
@json_option
def compare(before: str, after: str, tolerance: float, report: str | None, as_json: bool) -> None:
    """Compare run B with run A; exit code 1 where something became worse.

    That is: by more than the tolerance, and for sure (the whole 95 % interval), or where a row fails or is gone.
    """
    from vlmedge.device_bench.report.compare import compare as compared
    from vlmedge.device_bench.report.compare_text import render_markdown, render_text
    from vlmedge.device_bench.report.load import read_records
    from vlmedge.staging import write_text

    found = compared(read_records(Path(before)), read_records(Path(after)), tolerance)
    if report is not None:
        write_text(Path(report), render_markdown(found))
    if as_json:
        print_json(found.as_dict())
    else:
        click.echo(render_text(found), nl=False)
    if found.regressions:
        count = len(found.regressions)
        raise VlmedgeError(f"{count} regression{'s' * (count > 1)}; the first: {found.regressions[0]}")


@click.command("report")
@click.argument("folder", metavar="DIR")
def report(folder: str) -> None:
    """Write the reports of a run again, also of one that was stopped."""
    from vlmedge.device_bench.bench import write_reports
    from vlmedge.device_bench.report.load import read_records

    path = Path(folder)
    records = read_records(path)
    where = path if path.is_dir() else path.parent
    write_reports(where, records)
    click.echo(f"report: {where / 'report.html'}")


@click.command("devices")
@json_option
def devices(as_json: bool) -> None:
    """The devices and scenarios that are known by name."""
    from vlmedge.device_bench.device import device_names, load_device
    from vlmedge.device_bench.scenario import load_scenario, scenario_names

    known = [load_device(name) for name in device_names()]
    scenarios = [load_scenario(name) for name in scenario_names()]
    if as_json:
        keys = ("title", "host", "memory_gb", "cores", "bandwidth_gb_s", "source")
        print_json(
            {
                "devices": {d.name: {key: getattr(d, key) for key in keys} for d in known},
                "scenarios": {s.name: s.title for s in scenarios},
            }
        )
        return
    columns = ("device", "", "host", "memory, GB", "cores", "GB/s")
    rows = [(d.name, d.title, d.host, *map(_shown, (d.memory_gb, d.cores, d.bandwidth_gb_s))) for d in known]
    print_table("", columns, rows, right=columns[3:])
    print_table("", ("scenario", ""), [(s.name, s.title) for s in scenarios])


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
