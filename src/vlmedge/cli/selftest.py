"""vlmedge selftest: a bundle over its own test vectors, as an app does it on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vlmedge.cli.console import json_option, print_json, print_table, quiet_option, short_number, shown, threads_option
from vlmedge.cli.options import provider_option

if TYPE_CHECKING:
    from vlmedge.parity.report import StageResult
    from vlmedge.parity.selftest import SelfTest


@click.command("selftest")
@click.argument("bundle")
@click.option("--runtime", metavar="NAME", help="[default: the one for the bundle's format]")
@provider_option
@threads_option
@quiet_option
@json_option
def command(
    bundle: str, runtime: str | None, provider: str | None, threads: int | None, quiet: bool, as_json: bool
) -> int:
    """Run BUNDLE over its self-test vectors; no checkpoint, no PyTorch. Exit code 1 where a check fails."""
    from vlmedge.parity.selftest import selftest

    with shown(quiet or as_json) as progress:
        found = selftest(bundle, runtime, provider, threads, progress=progress)
    if as_json:
        print_json(found.as_dict())
    else:
        _print(found)
    return 0 if found.passed else 1


def _print(found: SelfTest) -> None:
    from vlmedge.parity.selftest import CHECKS

    rows = [
        (
            CHECKS[c.stage],
            c.outcome,
            short_number(c.relative_rms),
            short_number(c.limit),
            short_number(c.max_abs),
            _more(c),
        )
        for c in found.checks
    ]
    columns = ("check", "outcome", "relative RMS", "limit", "largest", "")
    print_table("", columns, rows, right=("relative RMS", "limit", "largest"))
    for note in found.notes:
        click.echo(f"note: {note}")
    runtime = f", {found.runtime}" if found.runtime else ""
    what = f"{found.bundle} ({found.format} {found.profile}{runtime})"
    if found.failing is None:
        partly = " as far as it was recorded" if found.notes else ""
        click.echo(f"{what} passes its self-test{partly}, {found.seconds:.1f} s")
        return
    check = found.checks[found.failing]
    click.echo(f"{what} FAILS at {CHECKS[check.stage]}: {check.why}")
    click.echo(f"usually: {found.cause}")


def _more(check: StageResult) -> str:
    """How many, and what did not go as recorded."""
    numbers = dict(check.numbers or {})
    equal = f"{numbers.pop('equal'):.0f} of " if "equal" in numbers else ""
    first = numbers.pop("first_divergence", None)
    words = [f"{equal}{count:.0f} {what}" for what, count in numbers.items()]
    words += [] if first is None else [f"first different {first:.0f}"]
    words += [f"{check.ambiguous} near ties"] if check.ambiguous else []
    words += [check.why] if check.outcome in ("skipped", "failed") else []
    return ", ".join(words)
