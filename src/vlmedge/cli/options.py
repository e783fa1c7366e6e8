"""Options that several verbs share: the format, and one flag per quantization profile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from vlmedge.errors import UsageError
from vlmedge.quant_profiles import profile_names

F = TypeVar("F", bound=Callable[..., Any])
DEFAULT_PROFILE = "q4"


def format_option(function: F) -> F:
    """Add --format."""
    return click.option("--format", "format_", required=True, metavar="gguf", help="The format to write.")(function)


def profile_options(function: F) -> F:
    """Add --quant NAME|FILE.toml and a flag for every shipped profile."""
    for name in reversed(profile_names()):
        flag = click.option(f"--{name.replace('_', '-')}", f"profile_{name}", is_flag=True, help=f"Profile {name}.")
        function = flag(function)
    return click.option(
        "--quant", metavar="NAME|FILE.toml", help=f"A quantization profile [default: {DEFAULT_PROFILE}]."
    )(function)


def pickle_option(function: F) -> F:
    """Add --allow-pickle."""
    text = "Read pickled weights, with torch's restricted loader."
    return click.option("--allow-pickle", is_flag=True, help=text)(function)


def chosen_profile(quant: str | None, flags: dict[str, Any]) -> str:
    """The one profile that was asked for; raises UsageError for two."""
    names = [key.removeprefix("profile_") for key, on in flags.items() if key.startswith("profile_") and on]
    names += [quant] if quant else []
    if len(names) > 1:
        raise UsageError(f"choose one profile, not {' and '.join(names)}")
    return names[0] if names else DEFAULT_PROFILE
