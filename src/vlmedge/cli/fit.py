"""vlmedge fit: will a bundle run in so much memory, part by part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from vlmedge.cli.console import json_option, megabytes, one_of, print_json, print_table
from vlmedge.errors import UsageError

if TYPE_CHECKING:
    from vlmedge.device_bench.fit import Budget, Fit
    from vlmedge.device_bench.footprint import Footprint


@click.command("fit")
@click.argument("bundle")
@click.option("--ram", metavar="SIZE", help="What the app may use: 4GB, 4GiB, 512MB.")
@click.option("--device", metavar="NAME|TOML", help="Instead: a device's memory, less a reserve for its system.")
@click.option("--context", type=click.IntRange(1), metavar="N", help="Positions [default: the model's own].")
@click.option(
    "--crops",
    type=click.IntRange(1, 1024),
    metavar="N",
    help="That a picture is encoded as [default: the model's most].",
)
@click.option(
    "--megapixels",
    type=click.FloatRange(0, 1000, min_open=True),
    default=12.0,
    metavar="N",
    show_default=True,
    help="Of the picture.",
)
@click.option(
    "--memory",
    default="fast",
    callback=one_of("fast", "lean"),
    metavar="fast|lean",
    show_default=True,
    help="As in 'vlmedge run'.",
)
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    bundle: str,
    ram: str | None,
    device: str | None,
    context: int | None,
    crops: int | None,
    megapixels: float,
    memory: Any,
    as_json: bool,
) -> None:
    """Tell whether BUNDLE runs in so much memory, from its manifest; nothing is opened.

    Exit code 0 where it fits, 1 where it does not.
    """
    from vlmedge.bundle import open_bundle
    from vlmedge.device_bench.fit import fit

    budget = _budget(ram, device)
    found = fit(open_bundle(bundle), budget, memory=memory, context=context, crops=crops, megapixels=megapixels)
    if as_json:
        print_json(_data(found))
    else:
        _show(found)
    ctx.exit(0 if found.fits else 1)


def _budget(ram: str | None, device: str | None) -> Budget:
    from vlmedge.device_bench.fit import Budget, device_budget, ram_bytes

    if ram is not None and device is None:
        size = ram_bytes(ram)
        return Budget(size, "--ram")
    if device is not None and ram is None:
        from vlmedge.device_bench.device import load_device

        return device_budget(load_device(device))
    raise UsageError("say either --ram (what the app may use, such as 4GB) or --device")


def _show(found: Fit) -> None:
    manifest, use, peak = found.bundle.manifest, found.use, found.footprint.peak
    bundle = f"{found.bundle.path} ({manifest.format}, profile {manifest.profile.name})"
    click.echo(f"{bundle} in {found.footprint.runtime}, memory {use.memory}")
    click.echo(f"use: {use.context} positions, a picture of {use.megapixels:g} megapixels encoded as {use.crops} crops")
    click.echo(f"budget: {megabytes(found.budget.bytes)} ({found.budget.reason})")
    answer, sign = ("yes, it fits", "<=") if found.fits else ("no, it does not fit", ">")
    click.echo(f"{answer}: {megabytes(peak.bytes)} {sign} {megabytes(found.budget.bytes)}")
    stages = found.footprint.stages
    rows = [(name, *(_number(stage.of(name)) for stage in stages)) for name in _names(found)]
    rows.append(("together", *(_number(stage.bytes) for stage in stages)))
    rows.append(("of it pages of files", *(_number(stage.bytes - stage.held) for stage in stages)))
    columns = [f"{stage.name} *" if stage is peak else stage.name for stage in stages]
    print_table("MB, stage by stage (* the peak)", ("part", *columns), rows, right=columns)
    for line in _lines(found):
        click.echo(f"- {line}")


def _names(found: Fit) -> Iterator[str]:
    from vlmedge.device_bench.footprint import PARTS

    return (name for name in PARTS if any(stage.of(name) for stage in found.footprint.stages))


def _number(count: float) -> str:
    return f"{count / 1e6:,.1f}" if count else ""


def _lines(found: Fit) -> Iterator[str]:
    """What follows from the numbers, a sentence or two each."""
    peak = found.footprint.peak
    if found.is_close:
        yield "that is close: predictions are right within 15 %, so measure it (vlmedge bench)"
    mapped, held = megabytes(peak.bytes - peak.held), megabytes(peak.held)
    yield f"the system can drop pages of files and read them again ({mapped} at the peak), but not the rest ({held})"
    if found.fits_by_dropping:
        yield "without these pages it would fit, but then every word reads weights from storage, which is slow"
    if found.short.peak.bytes < peak.bytes:
        yield f"a picture and a short answer take {megabytes(found.short.peak.bytes)}; the table has the context in use"
    if found.prepared.peak.bytes < peak.bytes:
        verb = "fits" if found.within(found.prepared) else "does not fit either"
        later = f"later ones take {megabytes(found.prepared.peak.bytes)}, which {verb}"
        yield f"the first opening copies the decoder for this processor; {later}"
    yield _about_context(found)
    yield _about_crops(found)
    yield (
        f"memory {found.other_use.memory} takes {megabytes(found.other.peak.bytes)}, which "
        f"{'fits' if found.within(found.other) else 'does not fit'}"
    )


def _about_context(found: Fit) -> str:
    own, most = found.bundle.manifest.model.decoder.context, found.largest_context
    if most is None:
        return "no context fits"
    return (
        f"the model's whole context fits: {own}" if most == own else f"the largest context that fits: {most} of {own}"
    )


def _about_crops(found: Fit) -> str:
    from vlmedge.device_bench.fit import MOST_CROPS

    more = f"another crop adds {megabytes(found.per_crop)} to the peak"
    effect = more if found.per_crop else "another crop adds nothing to the peak, crops are encoded one by one"
    if found.largest_crops is None:
        return f"{effect}; no number of crops fits"
    return f"{effect}; {'any number fits' if found.largest_crops == MOST_CROPS else f'{found.largest_crops} fit'}"


def _data(found: Fit) -> dict[str, Any]:
    manifest = found.bundle.manifest
    return {
        "bundle": str(found.bundle.path),
        "format": manifest.format,
        "profile": manifest.profile.name,
        "memory": found.use.memory,
        "context": found.use.context,
        "crops": found.use.crops,
        "megapixels": found.use.megapixels,
        "budget": {"bytes": round(found.budget.bytes), "reason": found.budget.reason},
        "fits": found.fits,
        "close": found.is_close,
        "fits_by_dropping": found.fits_by_dropping,
        **_footprint(found.footprint),
        "short_answer": _peak(found.short),
        "prepared": _peak(found.prepared),
        "other_memory": {"memory": found.other_use.memory, "fits": found.within(found.other), **_peak(found.other)},
        "largest_context": found.largest_context,
        "largest_crops": found.largest_crops,
        "bytes_per_crop": round(found.per_crop),
    }


def _footprint(found: Footprint) -> dict[str, Any]:
    stages = [
        {
            "stage": stage.name,
            "bytes": round(stage.bytes),
            "mapped": round(stage.bytes - stage.held),
            "parts": [{"part": p.name, "bytes": round(p.bytes), "mapped": p.mapped} for p in stage.parts if p.bytes],
        }
        for stage in found.stages
    ]
    return {"runtime": found.runtime, "peak": _peak(found), "stages": stages}


def _peak(found: Footprint) -> dict[str, Any]:
    return {
        "stage": found.peak.name,
        "bytes": round(found.peak.bytes),
        "mapped": round(found.peak.bytes - found.peak.held),
    }
