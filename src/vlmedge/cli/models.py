"""vlmedge models: the releases that have a short name."""

from __future__ import annotations

import click

from vlmedge.cli.console import json_option, print_json, print_table


@click.command("models")
@json_option
def command(as_json: bool) -> None:
    """List the models that can be named; any hub id or folder of their families works too."""
    from vlmedge.demo import demo_names
    from vlmedge.families import FAMILIES
    from vlmedge.sources import DEMO_LICENCE

    rows = [
        (m.name, family.name, m.repo, m.revision, m.licence, m.summary)
        for family in FAMILIES.values()
        for m in family.models
    ]
    rows += [
        (f"demo:{name}", name, "shipped", "", DEMO_LICENCE, "tiny, trained by vlmedge itself") for name in demo_names()
    ]
    if as_json:
        keys = ("name", "family", "repo", "revision", "licence", "summary")
        print_json({"models": [dict(zip(keys, row, strict=True)) for row in rows]})
        return
    print_table("", ("name", "family", "repository", "revision", "licence", "what it is"), rows)
