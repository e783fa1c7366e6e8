"""What is installed is what is here."""

import importlib
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import vlmedge

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAPPED = {
    "exporters": "vlmedge.exporters",
    "quant_profiles": "vlmedge.quant_profiles",
    "device_bench": "vlmedge.device_bench",
}


def packages_on_disk():
    yield from (_dotted("vlmedge", ROOT / "src/vlmedge", p) for p in (ROOT / "src/vlmedge").rglob("__init__.py"))
    for folder, name in MAPPED.items():
        yield from (_dotted(name, ROOT / folder, p) for p in (ROOT / folder).rglob("__init__.py"))


def _dotted(name, base, init):
    return ".".join([name, *init.parent.relative_to(base).parts])


def test_every_package_is_listed():
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(packages_on_disk())


def test_no_second_copy_under_a_bare_name():
    for name in MAPPED.values():
        importlib.import_module(name)
    assert not set(MAPPED) & set(sys.modules)


def test_public_names_are_sorted_and_importable():
    assert vlmedge.__all__ == sorted(vlmedge.__all__)
    for name in vlmedge.__all__:
        assert getattr(vlmedge, name) is not None


def test_unknown_public_name():
    with pytest.raises(AttributeError, match="has no attribute 'exprot'"):
        vlmedge.exprot  # noqa: B018


def test_version_is_the_projects():
    assert vlmedge.__version__ == PROJECT["project"]["version"]


HEAVY = (
    "torch",
    "onnx",
    "onnxruntime",
    "llama_cpp",
    "coremltools",
    "gguf",
    "tokenizers",
    "huggingface_hub",
    "numpy",
    "rich",
)
HELP = f"""
import sys
sys.argv = ["vlmedge", "--help"]
from vlmedge.cli import main
try:
    main()
except SystemExit as stop:
    assert stop.code == 0
print(sorted(set({HEAVY!r}) & set(sys.modules)))
"""


def test_help_imports_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_import_vlmedge_imports_nothing_heavy():
    code = f"import sys, vlmedge; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_wheel_holds_every_package(tmp_path):
    """The wheel that pip would build lists the same modules and data files as the source tree."""
    # A copy: setuptools would take files deleted long ago from a build folder that lies around.
    keep = shutil.ignore_patterns(".git", ".venv*", "build", "dist", "__pycache__", ".*cache", "*.egg-info", "tests")
    shutil.copytree(ROOT, tmp_path / "tree", ignore=keep)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(tmp_path / "tree")], check=True, capture_output=True
    )
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for folder, inside in (("src/vlmedge", "vlmedge"), *((f, f"vlmedge/{f}") for f in MAPPED)):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".toml", ".json", ".safetensors", ".png") and "__pycache__" not in path.parts:
                assert f"{inside}/{path.relative_to(ROOT / folder).as_posix()}" in names
