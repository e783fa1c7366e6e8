"""Faults that converters and runtimes really have had, as data: what the gate must catch."""

from __future__ import annotations

from vlmedge.parity.faults.catalogue import FAULTS
from vlmedge.parity.faults.fault import Fault, Given, Running, Shared, Target, Written
from vlmedge.parity.faults.planting import REFUSED, Finding, Setting, attempt, examined, settled

__all__ = [
    "FAULTS",
    "REFUSED",
    "Fault",
    "Finding",
    "Given",
    "Running",
    "Setting",
    "Shared",
    "Target",
    "Written",
    "attempt",
    "examined",
    "settled",
]
