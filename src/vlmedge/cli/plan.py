"""vlmedge plan: what an export would write, tensor by tensor, without reading weights."""

from __future__ import annotations

from typing import Any

import click

from vlmedge.cli.console import json_option, megabytes, print_json, print_table, quiet_option, shown
from vlmedge.cli.options import (
    chosen_profile,
    flavour_option,
    format_option,
    part_option,
    pickle_option,
    profile_options,
)


@click.command("plan")
@click.argument("source")
@format_option
@profile_options
@flavour_option
@part_option
@pickle_option
@quiet_option
@json_option
def command(
    source: str,
    format_: str,
    quant: str | None,
    flavour: str | None,
    max_part: int | None,
    allow_pickle: bool,
    quiet: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Print every tensor of SOURCE with its shape, encoding and bytes, and the total."""
    show_plan(source, format_, chosen_profile(quant, flags), flavour, max_part, allow_pickle, quiet, as_json)


def show_plan(
    source: str,
    format_: str,
    profile: str | None,
    flavour: str | None,
    max_part: int | None,
    allow_pickle: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Compute and print a plan."""
    from vlmedge.pipeline import plan

    with shown(quiet) as progress:
        found = plan(
            source,
            format_,
            profile,
            flavour=flavour,
            max_part=max_part,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    if as_json:
        tensors = [
            {
                "name": name,
                "shape": list(found.shapes[name.partition("#")[0]]),
                "file": e.file,
                "tensor": e.tensor,
                "stored_shape": list(e.shape),
                "type": e.type,
                "bytes": e.bytes,
                "note": e.note,
            }
            for name, e in found.encodings.items()
        ]
        print_json(
            {
                "source": found.source,
                "format": found.format,
                "flavour": found.flavour,
                "profile": found.profile,
                "bytes": found.bytes,
                "tensors": tensors,
            }
        )
        return
    rows = [
        (name, " x ".join(map(str, e.shape)), e.type, f"{e.bytes:,}", e.file, e.note)
        for name, e in found.encodings.items()
    ]
    flavour = f" ({found.flavour})" if found.flavour else ""
    title = f"{found.source} as {found.format}{flavour}, profile {found.profile}: {megabytes(found.bytes)}"
    print_table(title, ("tensor", "shape", "type", "bytes", "file", "note"), rows, right=("bytes",))
    click.echo(f"{len(rows)} tensors, {found.bytes:,} bytes")
