"""vlmedge inspect: what a bundle is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from vlmedge.cli.console import json_option, megabytes, print_json, print_table
from vlmedge.errors import BundleError


@click.command("inspect")
@click.argument("bundle")
@click.option("--check", is_flag=True, help="Compare every file with its hash.")
@json_option
def command(bundle: str, check: bool, as_json: bool) -> None:
    """Print the manifest of BUNDLE: source, components, files, contract, verification."""
    from vlmedge.bundle import open_bundle
    from vlmedge.records import encode

    found = open_bundle(bundle)
    if check:
        found.check()
    m = found.manifest
    if as_json:
        print_json(encode(m))
        return
    origin = m.source.repo and f"{m.source.repo} at {m.source.revision} ({m.source.commit})"
    lines = {
        "bundle": f"{found.path} ({megabytes(found.bytes)}{', hashes right' if check else ''})",
        "model": f"{m.model.family} from {origin or m.source.label}",
        "licence": m.licence or "not stated by the source",
        "format": f"{m.format}, profile {m.profile.name}: {m.profile.bits_per_weight:.2f} bits per weight",
        "skills": ", ".join(m.skills),
        "picture": f"{m.model.image.size} x {m.model.image.size} crops, {m.model.image_tokens} tokens",
        "context": f"{m.model.decoder.context} positions, KV cache {megabytes(m.memory.kv_context)} "
        f"({m.profile.kv_cache})",
        "tokenizer": f"{m.tokenizer.file}, pre-tokenizer {m.tokenizer.pre_tokenizer}, {m.tokenizer.ids:,} ids",
        "requires": ", ".join(f"{name} {version}" for name, version in m.requires.items()),
        "verified": _verification(m.verification),
    }
    for key, value in lines.items():
        click.echo(f"{key:10} {value}")
    rows = [
        (
            c.name,
            f"{c.parameters:,}",
            f"{c.bytes:,}",
            f"{c.bits_per_weight:.2f}",
            ", ".join(c.types),
            ", ".join(c.files),
        )
        for c in m.components
    ]
    columns = ("component", "weights", "bytes", "bits each", "types", "files")
    print_table("", columns, rows, right=("weights", "bytes", "bits each"))
    print_table(
        "",
        ("file", "role", "bytes", "sha256"),
        [(f.path, f.role, f"{f.bytes:,}", f.sha256) for f in m.files],
        ("bytes",),
    )
    for note in (*m.notes, *m.stock):
        click.echo(f"- {note}")


def _verification(outcome: Mapping[str, Any]) -> str:
    if not outcome.get("verified"):
        return f"no: {outcome.get('reason')}"
    try:
        return "; ".join(_compared(outcome["stages"], against) for against in ("stored", "original"))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise BundleError("the manifest's verification is not readable; export again") from None


_BESIDE = {"stored": "the reference on the stored weights", "original": "the original"}


def _compared(stages: list[Mapping[str, Any]], against: str) -> str:
    """The relative RMS of each stage of one comparison, and how many tokens are the same."""
    found = [s for s in stages if s.get("against") == against]
    if not found:
        return f"not beside {_BESIDE[against]}"
    words = ", ".join(f"{s['stage']} {s['relative_rms']:.1e}" for s in found if "relative_rms" in s)
    chosen = next((s["numbers"] for s in found if s["stage"] == "tokens" and "top1" in s.get("numbers", {})), None)
    equal = f"; {chosen['top1']:.0%} of {chosen['positions']:.0f} tokens equal" if chosen else ""
    return f"beside {_BESIDE[against]}: relative RMS {words}{equal}"
