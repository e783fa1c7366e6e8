"""The unit that computes: a CPU, a kind of GPU, an accelerator. Exactly the one that is asked for, or an error."""

from __future__ import annotations

from collections.abc import Mapping

from vlmedge.errors import UnavailableError, UsageError, nearest

CPU = "cpu"


def check_unit(runtime: str, unit: str, units: Mapping[str, str]) -> str:
    """Return `unit` as it stands in `units` (see `Runtime.units`), where it can be used here.

    Raises UsageError for a name that is none of them, UnavailableError with the remedy for one of no use here.
    """
    name = unit.lower()
    if name not in units:
        raise UsageError(f"the runtime '{runtime}' has no unit '{unit}'{nearest(name, units)}")
    if why := units[name]:
        raise UnavailableError(f"the runtime '{runtime}' cannot compute on '{name}' here: {why}")
    return name
