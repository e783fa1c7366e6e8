"""A battery's own measurement while it is discharged: what a laptop, a phone or a board takes as a whole.

Files of `/sys/class/power_supply/NAME` (Documentation/power/power_supply_class.rst): `power_now` in micro-watts, else
`current_now` in micro-amperes times `voltage_now` in micro-volts; some drivers give what flows out a minus sign. Gauges
settle in seconds: runs shorter than half a minute say little.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmedge.device_bench.energy.meter import SAMPLED, Meter, Sampled, Watched
from vlmedge.device_bench.system_file import text
from vlmedge.errors import RuntimeFailedError

ROOT = Path("/sys/class/power_supply")


def find(root: Path = ROOT) -> Meter | str:
    """The sum of this machine's batteries while they are discharged; why not; "" where there is none."""
    batteries = [b for b in sorted(root.glob("*")) if text(b / "type") == "Battery" and text(b / "scope") != "Device"]
    if not batteries:
        return ""
    if not any(text(b / "status") == "Discharging" for b in batteries):
        return "the battery tells what the machine takes only while it is discharged: unplug it"
    try:
        _watts(batteries)
    except (OSError, ValueError) as error:
        return f"the battery's power cannot be read: {error}"
    return Watched("battery: " + ", ".join(b.name for b in batteries), Sampled(lambda: _watts(batteries)), SAMPLED)


def _watts(batteries: Sequence[Path]) -> float:
    if any(text(b / "status") == "Charging" for b in batteries):
        raise RuntimeFailedError("the battery was charged meanwhile; unplug it and run the job again")
    return sum(_power(b) for b in batteries if text(b / "status") == "Discharging")


def _power(battery: Path) -> float:
    if (battery / "power_now").exists():
        return abs(_number(battery / "power_now")) * 1e-6
    return abs(_number(battery / "current_now")) * _number(battery / "voltage_now") * 1e-12


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))
