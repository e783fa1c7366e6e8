"""`optimum-cli export edge`: the real optimum-cli of this environment, with the plug-in's folder on its path."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import vlmedge

ROOT = Path(__file__).parent.parent
PLUGIN = ROOT / "plugins/optimum"
FILE = "optimum/commands/register/register_vlmedge.py"
OPTIMUM = ("-m", "optimum.commands.optimum_cli", "export")
OURS = ("-m", "vlmedge", "export")


def project(folder):
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


def run(*words, cwd=ROOT):
    environment = os.environ | {"PYTHONPATH": str(PLUGIN), "COLUMNS": "100"}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True)


def test_a_bundle_is_exported(tmp_path):
    words = ["edge", "--format", "gguf", "demo:moondream2", "--q8", "--no-verify", "--out", "here", "--quiet"]
    done = run(*OPTIMUM, *words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("here: ")
    manifest = vlmedge.open_bundle(tmp_path / "here").manifest
    assert (manifest.format, manifest.profile.name) == ("gguf", "q8")


def test_optimum_lists_the_command():
    done = run(*OPTIMUM, "--help")
    assert done.returncode == 0
    assert "edge" in done.stdout
    assert "vlmedge" in done.stdout


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--help",), 0),
        (("demo:moondream2", "-h"), 0),
        ((), 2),
        (("demo:moondream2", "--format", "gguf", "--q44"), 2),
        (("demo:moondream2", "--form", "gguf"), 2),
        (("demo:moondream2", "--format", "gguf", "--q4", "--q8"), 2),
        (("demo:moondream2", "--format", "gguf", "--out", "docs"), 1),
        (("demo:moondream2", "--format", "gguf", "--dry-run", "--json"), 0),
    ],
)
def test_every_word_means_what_it_means_to_vlmedge(words, code):
    theirs, ours = run(*OPTIMUM, "edge", *words), run(*OURS, *words)
    assert theirs.returncode == ours.returncode == code
    assert (theirs.stdout, theirs.stderr) == (ours.stdout, ours.stderr)
    assert code == 0 or theirs.stderr.count("\n") == 1


def test_vlmedge_itself_brings_no_folder_of_optimums():
    """A bare `optimum/` makes transformers 5 believe that optimum is installed (docs/optimum.md)."""
    assert {name.partition(".")[0] for name in project(ROOT)["tool"]["setuptools"]["packages"]} == {"vlmedge"}


def test_the_plugins_wheel_is_one_file(tmp_path):
    shutil.copytree(PLUGIN, tmp_path / "tree", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    options = ["--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(tmp_path / "tree")], check=True, capture_output=True
    )
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert [name for name in names if ".dist-info/" not in name] == [FILE]


def test_the_plugin_follows_vlmedge():
    plugin, main = project(PLUGIN)["project"], project(ROOT)["project"]
    assert plugin["version"] == main["version"]
    assert plugin["requires-python"] == main["requires-python"]
    assert set(main["optional-dependencies"]["optimum"]) <= set(plugin["dependencies"])
