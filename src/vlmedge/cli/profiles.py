"""vlmedge profiles: the quantization profiles that ship."""

from __future__ import annotations

import click

from vlmedge.cli.console import json_option, print_json, print_table
from vlmedge.quant_profiles import load_profile, profile_names


@click.command("profiles")
@json_option
def command(as_json: bool) -> None:
    """List the quantization profiles; --quant also takes the path of your own .toml."""
    found = [load_profile(name) for name in profile_names()]
    if as_json:
        data = [{"name": p.name, "summary": p.summary, "rules": len(p.rules), "kv_cache": p.kv_cache} for p in found]
        print_json({"profiles": data})
        return
    print_table(
        "", ("profile", "rules", "what it is"), [(p.name, str(len(p.rules)), p.summary) for p in found], ("rules",)
    )
