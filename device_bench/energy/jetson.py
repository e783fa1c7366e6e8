"""A Jetson's INA3221: power at the board's rails, sampled.

The chip is a hwmon device named "ina3221": `inN_input` in mV, `currN_input` in mA, `inN_label` the rail's name
(Documentation/hwmon/ina3221.rst, Documentation/hwmon/sysfs-interface.rst). Rails by board: NVIDIA's Jetson Linux
Developer Guide, "Software-Based Power Consumption Modeling" and "Jetson Power Supply".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmedge.device_bench.energy.meter import SAMPLED, Meter, Sampled, Watched
from vlmedge.device_bench.system_file import text

ROOT = Path("/sys/class/hwmon")
# What all else on the module is fed from: Xavier NX and Orin NX/Nano; Jetson Nano. Boards without one (AGX Xavier,
# AGX Orin) have rails that stand beside each other.
TOTAL = ("VDD_IN", "POM_5V_IN")
# NVIDIA's driver names a channel of sums so; the mainline one numbers it 4 and leaves it to `shuntN`.
_NOT_RAILS = ("", "NC", "sum of shunt voltages")


@dataclass(frozen=True, slots=True)
class Rail:
    """One channel of a chip."""

    chip: Path
    channel: int
    name: str

    def watts(self) -> float:
        """Its power now. Raises OSError or ValueError where it cannot be read."""
        millivolts, milliamperes = (
            int((self.chip / f"{kind}{self.channel}_input").read_text(encoding="ascii")) for kind in ("in", "curr")
        )
        return millivolts * milliamperes * 1e-6


def find(root: Path = ROOT) -> Meter | str:
    """The board's input where it is measured, else the sum of its rails; "" where there is no INA3221."""
    rails = [rail for chip in sorted(root.glob("hwmon*")) for rail in _rails(chip)]
    chosen = [rail for rail in rails if rail.name in TOTAL] or rails
    if not chosen:
        return ""
    try:
        _watts(chosen)
    except (OSError, ValueError) as error:
        return f"the INA3221 cannot be read: {error}"
    return Watched("ina3221: " + ", ".join(r.name for r in chosen), Sampled(lambda: _watts(chosen)), SAMPLED)


def _watts(rails: Sequence[Rail]) -> float:
    return sum(rail.watts() for rail in rails)


def _rails(chip: Path) -> list[Rail]:
    if text(chip / "name") != "ina3221":
        return []
    found = (Rail(chip, channel, text(chip / f"in{channel}_label")) for channel in (1, 2, 3))
    return [rail for rail in found if rail.name not in _NOT_RAILS and (chip / f"curr{rail.channel}_input").exists()]
