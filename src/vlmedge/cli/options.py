"""Options that several verbs share: the format and its flavour, and one flag per quantization profile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from vlmedge.errors import UsageError
from vlmedge.quant_profiles import profile_names

F = TypeVar("F", bound=Callable[..., Any])
# Facts of EXPORTERS, whose import would make --help slow; a test holds them equal.
FORMATS = {"gguf": "q4", "onnx": "w8a8"}  # format -> default profile
FLAVOURS = {"onnx": ("ort", "portable")}  # of formats that have several
LEAST_PART = 1_000_000


def format_option(function: F) -> F:
    """Add --format."""
    metavar, text = "|".join(FORMATS), "The format to write."
    return click.option("--format", "format_", required=True, metavar=metavar, help=text)(function)


def flavour_option(function: F) -> F:
    """Add --flavour."""
    metavar = "|".join(name for names in FLAVOURS.values() for name in names)
    text = f"How to write it [default: {', '.join(f'{names[0]} for {f}' for f, names in FLAVOURS.items())}]."
    return click.option("--flavour", metavar=metavar, help=text)(function)


def profile_options(function: F) -> F:
    """Add --quant NAME|FILE.toml and a flag for every shipped profile."""
    for name in reversed(profile_names()):
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        flag = click.option(*spellings, _flag_key(name), is_flag=True, help=f"Profile {name}.")
        function = flag(function)
    text = f"A quantization profile [default: {', '.join(f'{name} for {f}' for f, name in FORMATS.items())}]."
    return click.option("--quant", metavar="NAME|FILE.toml", help=text)(function)


def part_option(function: F) -> F:
    """Add --max-part."""
    text = "Cut files of more bytes, where the format can; K, M and G count [default: 1.4G]."
    return click.option("--max-part", "max_part", metavar="SIZE", callback=_size, help=text)(function)


def _size(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | None:
    """Bytes of a size such as 512M."""
    if value is None:
        return None
    number, unit = (value[:-1], value[-1].upper()) if value[-1:].isalpha() else (value, "")
    try:
        size = int(float(number) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < LEAST_PART:
        raise UsageError(f"--max-part takes a size of at least 1M, such as 512M or 1.4G, not '{value}'")
    return size


def provider_option(function: F) -> F:
    """Add --provider."""
    text = "The unit that computes: cpu, cuda, metal, ... (see vlmedge doctor) [default: cpu]."
    return click.option("--provider", metavar="NAME", help=text)(function)


def pickle_option(function: F) -> F:
    """Add --allow-pickle."""
    text = "Read pickled weights, with torch's restricted loader."
    return click.option("--allow-pickle", is_flag=True, help=text)(function)


def chosen_profile(quant: str | None, flags: dict[str, Any]) -> str | None:
    """The one profile that was asked for, None for the format's default; raises UsageError for two."""
    names = [name for name in profile_names() if flags.get(_flag_key(name))]
    names += [quant] if quant else []
    if len(names) > 1:
        raise UsageError(f"choose one profile, not {' and '.join(names)}")
    return names[0] if names else None


def _flag_key(profile: str) -> str:
    """The parameter of a profile's flag: Python's names have no '-'."""
    return f"profile_{profile.replace('-', '_')}"
