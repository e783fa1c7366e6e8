"""RAPL: the energy of processor packages and of their memory, counted by Intel's and AMD's processors themselves.

Linux shows it as zones `/sys/class/powercap/intel-rapl:N` with subzones `intel-rapl:N:M`, AMD's too. `energy_uj` is in
micro-joules and begins at 0 again behind `max_energy_range_uj` (Documentation/power/powercap/powercap.rst). Since
Linux 5.10 only root may read it (CVE-2020-8694).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from vlmedge.device_bench.energy.meter import COUNTED, Counted, Meter, Register, Watched

ROOT = Path("/sys/class/powercap")


def find(root: Path = ROOT) -> Meter | str:
    """The sum of all packages and their memory; why it cannot be read; "" where there is none.

    A package's cores and graphics are in it already, its memory ("dram") is not. "psys", a laptop's whole board, is not
    taken: it holds the packages again, and what it measures is each maker's choice.
    """
    zones = [(zone, name) for zone, name in _zones(root) if name.startswith(("package", "dram"))]
    if not zones:
        return ""
    try:
        registers = [_register(zone) for zone, _ in zones]
    except PermissionError:
        command = f"sudo chmod a+r {root}/intel-rapl:*/energy_uj {root}/intel-rapl:*/intel-rapl:*/energy_uj"
        return f"RAPL's counters are readable by root only: {command}"
    except (OSError, ValueError) as error:
        return f"RAPL's counters cannot be read: {error}"
    return Watched("rapl: " + ", ".join(name for _, name in zones), Counted(registers), COUNTED)


def _zones(root: Path) -> Iterator[tuple[Path, str]]:
    """Zones and their names. `intel-rapl-mmio:N` shows the packages once more, by another way."""
    for zone in sorted([*root.glob("intel-rapl:*"), *root.glob("intel-rapl:*/intel-rapl:*")]):
        # The class folder links to subzones too, which are met below their package.
        if zone.parent == root and not re.fullmatch(r"intel-rapl:\d+", zone.name):
            continue
        try:
            yield zone, (zone / "name").read_text(encoding="ascii").strip()
        except OSError:
            continue


def _register(zone: Path) -> Register:
    counter = zone / "energy_uj"

    def read() -> int:
        return int(counter.read_text(encoding="ascii"))

    read()  # raises where it may not be read
    return Register(read, 1e-6, int((zone / "max_energy_range_uj").read_text(encoding="ascii")))
