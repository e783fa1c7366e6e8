"""Commands and links in the documents are real."""

import re
from pathlib import Path

import click
import pytest

from vlmedge.cli import VERBS, group
from vlmedge.quant_profiles import profile_names

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(r"^vlmedge ([a-z]+)([^#\n]*)", re.MULTILINE)
PATH = re.compile(r"(?:python|sh) ((?:benchmarks|scripts)/[a-z_./]+)")


def ids(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_commands_exist(path):
    text = path.read_text(encoding="utf-8")
    for verb, rest in COMMAND.findall(text):
        assert verb in VERBS, verb
        command = group.get_command(click.Context(group), verb)
        assert command is not None
        commands = [command, *getattr(command, "commands", {}).values()]
        known = {option for each in commands for parameter in each.params for option in parameter.opts}
        for option in re.findall(r"(--[a-z0-9_-]+)", rest):
            assert option in known, f"vlmedge {verb} {option}"
    for script in PATH.findall(text):
        assert (ROOT / script).is_file(), script


def test_every_profile_is_in_the_table():
    table = (ROOT / "docs/profiles.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in table for name in profile_names())
