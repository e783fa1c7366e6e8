"""All faults, by the place where they are planted."""

from __future__ import annotations

from typing import Final

from vlmedge.parity.faults.facts import FACTS
from vlmedge.parity.faults.fault import Fault
from vlmedge.parity.faults.manifest import MANIFEST
from vlmedge.parity.faults.running import RUNNING
from vlmedge.parity.faults.shared import SHARED
from vlmedge.parity.faults.stored import STORED
from vlmedge.parity.faults.tensors import WEIGHTS

# name -> fault.
FAULTS: Final[dict[str, Fault]] = {
    fault.name: fault for fault in (*WEIGHTS, *FACTS, *MANIFEST, *STORED, *RUNNING, *SHARED)
}
