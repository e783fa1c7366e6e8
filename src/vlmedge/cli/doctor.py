"""vlmedge doctor: what is installed, what can run and compute here, and what to do about the rest."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import click

from vlmedge import __version__
from vlmedge.cli.console import json_option, print_json, print_table
from vlmedge.errors import VlmedgeError

BASE = (
    "numpy",
    "pillow",
    "tokenizers",
    "huggingface_hub",
    "gguf",
    "libggml-python",
    "onnx",
    "onnx-ir",
    "onnxruntime",
)
EXTRAS = {"llamacpp": "llama-cpp-python", "torch": "torch", "coreml": "coremltools", "optimum": "optimum", "ray": "ray"}


@click.command("doctor")
@json_option
def command(as_json: bool) -> None:
    """Check this machine; exit code 1 where a part of the base install is broken."""
    from vlmedge.device_bench.environment import cpu_model
    from vlmedge.exporters import EXPORTERS
    from vlmedge.runtimes import RUNTIMES

    packages = [(name, _version(name), "" if _version(name) else "pip install vlmedge") for name in BASE]
    packages += [
        (
            f"{package} (extra {extra})",
            _version(package),
            "" if _version(package) else f"pip install 'vlmedge[{extra}]'",
        )
        for extra, package in EXTRAS.items()
    ]
    uses = [(f"run {RUNTIMES[name].loads} ({name})", RUNTIMES[name].missing() or "") for name in RUNTIMES]
    uses += [(f"export {name}", _export_problem(name)) for name in EXPORTERS]
    units = [
        (runtime, unit, why)
        for runtime in RUNTIMES
        if RUNTIMES[runtime].missing() is None
        for unit, why in RUNTIMES[runtime].units().items()
    ]
    machine = {
        "vlmedge": __version__,
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "processor": cpu_model(),
        "cores": os.cpu_count(),
        "memory_mb": _memory_mb(),
    }
    broken = [name for name, found, _ in packages[: len(BASE)] if not found]
    if as_json:
        print_json(
            {
                "machine": machine,
                "packages": {name: found or None for name, found, _ in packages},
                "usable": {name: not problem for name, problem in uses},
                "units": {name: {unit: why for of, unit, why in units if of == name} for name in RUNTIMES},
                "problems": [p for _, p in uses if p],
            }
        )
    else:
        for key, value in machine.items():
            click.echo(f"{key:10} {value}")
        print_table("", ("package", "version", "to install"), [(n, v or "-", todo) for n, v, todo in packages])
        print_table("", ("use", "works", "what to do"), [(n, "no" if p else "yes", p) for n, p in uses])
        print_table(
            "",
            ("runtime", "computes on", "here", "why not, and what to do"),
            [(runtime, unit, "no" if why else "yes", why) for runtime, unit, why in units],
        )
    if broken:
        raise VlmedgeError(
            f"the base install is incomplete: {', '.join(broken)} missing; pip install --force-reinstall vlmedge"
        )


def _export_problem(name: str) -> str:
    from vlmedge.exporters import EXPORTERS

    try:
        return EXPORTERS[name].missing() or ""
    except ImportError as error:
        return f"{error}; pip install --force-reinstall vlmedge"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _memory_mb() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 1_000_000
    except (AttributeError, ValueError, OSError):
        return None
