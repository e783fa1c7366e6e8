"""vlmedge export: a checkpoint becomes a verified bundle."""

from __future__ import annotations

import time
from typing import Any

import click

from vlmedge.cli.console import json_option, megabytes, print_json, quiet_option, shown, threads_option
from vlmedge.cli.options import (
    chosen_profile,
    flavour_option,
    format_option,
    part_option,
    pickle_option,
    profile_options,
)


@click.command("export")
@click.argument("source")
@format_option
@profile_options
@flavour_option
@click.option("--out", metavar="DIR", help="The bundle's folder [default: NAME-PROFILE[-FLAVOUR].FORMAT here].")
@click.option("--no-verify", is_flag=True, help="Do not compare with the original.")
@click.option("--dry-run", is_flag=True, help="Print what would be written, read no weights, write nothing.")
@part_option
@pickle_option
@threads_option
@quiet_option
@json_option
def command(
    source: str,
    format_: str,
    quant: str | None,
    flavour: str | None,
    out: str | None,
    no_verify: bool,
    dry_run: bool,
    max_part: int | None,
    allow_pickle: bool,
    threads: int | None,
    quiet: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Convert SOURCE (a known model, a hub id with optional @revision, a folder, demo:NAME) into a bundle."""
    profile = chosen_profile(quant, flags)
    if dry_run:
        from vlmedge.cli.plan import show_plan

        show_plan(source, format_, profile, flavour, max_part, allow_pickle, quiet, as_json)
        return
    from vlmedge.measure import peak_rss_mb
    from vlmedge.pipeline import export

    start = time.perf_counter()
    with shown(quiet) as progress:
        bundle = export(
            source,
            format_,
            profile,
            out,
            flavour=flavour,
            verify=not no_verify,
            threads=threads,
            max_part=max_part,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    seconds, manifest = time.perf_counter() - start, bundle.manifest
    bits = manifest.profile.bits_per_weight
    if as_json:
        print_json(
            {
                "bundle": str(bundle.path),
                "format": manifest.format,
                "flavour": manifest.flavour,
                "profile": manifest.profile.name,
                "bytes": bundle.bytes,
                "bits_per_weight": bits,
                "seconds": round(seconds, 2),
                "peak_rss_mb": peak_rss_mb(),
                "verification": manifest.verification,
            }
        )
        return
    outcome = _outcome(manifest.verification)
    click.echo(f"{bundle.path}: {megabytes(bundle.bytes)}, {bits:.2f} bits per weight, {outcome}, {seconds:.1f} s")


def _outcome(verification: dict[str, Any]) -> str:
    """What came of verification: judged by every shipped profile, only measured by one of the user's without limits."""
    if not verification.get("verified"):
        return "not verified"
    logits, tokens = ([s for s in verification["stages"] if s["stage"] == name][-1] for name in ("logits", "tokens"))
    words = tokens.get("numbers", {}).get("top1", 1.0)
    return f"right beside the original (logits {logits['relative_rms']:.1e} off, {words:.0%} of the words the same)"
