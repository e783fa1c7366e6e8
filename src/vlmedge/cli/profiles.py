"""vlmedge profiles: the quantization profiles that ship."""

from __future__ import annotations

from typing import Any

import click

from vlmedge.cli.console import json_option, print_json, print_table
from vlmedge.cli.options import FORMATS
from vlmedge.quant_profiles import QuantProfile, load_profile, profile_names


@click.command("profiles")
@json_option
def command(as_json: bool) -> None:
    """List the quantization profiles; --quant also takes the path of your own .toml."""
    found = [load_profile(name) for name in profile_names()]
    if as_json:
        print_json({"profiles": [_facts(profile) for profile in found]})
        return
    rows = [(p.name, ", ".join(p.formats) or "all", str(_rules(p)), p.summary) for p in found]
    print_table("", ("profile", "formats", "rules", "what it is"), rows, right=("rules",))


def _facts(profile: QuantProfile) -> dict[str, Any]:
    return {
        "name": profile.name,
        "summary": profile.summary,
        "formats": list(profile.formats or FORMATS),
        "rules": _rules(profile),
        "kv_cache": profile.kv_cache,
    }


def _rules(profile: QuantProfile) -> int:
    return len(profile.rules) + len(profile.prefill)
