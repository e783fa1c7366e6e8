"""fit(): will a bundle run in so much memory, and with which context, crops and memory mode would it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from vlmedge.bundle import Bundle
from vlmedge.device_bench.device import Device
from vlmedge.device_bench.footprint import Footprint, Use, footprint, prefill_positions
from vlmedge.errors import UsageError
from vlmedge.loading import with_context
from vlmedge.runtimes import Memory

MOST_CROPS: Final = 1024  # that anyone is told of
MARGIN: Final = 0.15  # predictions are that near to measured peaks, see docs/fit.md
_UNITS: Final = {"MB": 10**6, "GB": 10**9, "MIB": 1 << 20, "GIB": 1 << 30}
# An app may use this share of a phone. Android ended one at 3.2 GB on a phone that shows 5.7 GB
# (elizaOS/eliza#11760), iOS one at 4.8 GB on an iPhone of 8 GB (mere-run pull request 331).
_PHONE_SHARE: Final = 0.55
_RESERVE, _LEAST_RESERVE = 0.25, 0.5e9  # of a computer, for its system and what else runs: a convention of ours
_PHONES: Final = ("adb", "iphone")


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes that the app may use, and why so many; `local`: on this machine's own processor."""

    bytes: float
    reason: str
    local: bool = True


@dataclass(frozen=True, slots=True)
class Fit:
    """The answer for one bundle, budget and use.

    `short`: a picture and a short answer, where `footprint` has the whole context in use. `largest_context`: positions
    that fit, `largest_crops`: crops that do; None where none does, at most the model's context and `MOST_CROPS`.
    `per_crop`: bytes that a crop more adds to the peak. `other`: the other memory mode. `prepared`: the same use where
    the runtime's files for this machine are there already.
    """

    bundle: Bundle
    budget: Budget
    use: Use
    footprint: Footprint
    short: Footprint
    prepared: Footprint
    other_use: Use
    other: Footprint
    largest_context: int | None
    largest_crops: int | None
    per_crop: float

    @property
    def fits(self) -> bool:
        """Is the peak within the budget?"""
        return self.within(self.footprint)

    @property
    def is_close(self) -> bool:
        """Is the budget so near to the peak that the prediction's error could turn the answer?"""
        return abs(self.footprint.peak.bytes - self.budget.bytes) < MARGIN * self.footprint.peak.bytes

    @property
    def fits_by_dropping(self) -> bool:
        """Would the peak be within the budget if the system dropped every page of a file?"""
        return not self.fits and max(stage.held for stage in self.footprint.stages) <= self.budget.bytes

    def within(self, found: Footprint) -> bool:
        """Is this footprint's peak within the budget?"""
        return found.peak.bytes <= self.budget.bytes


def fit(
    bundle: Bundle,
    budget: Budget,
    *,
    memory: Memory = "fast",
    context: int | None = None,
    crops: int | None = None,
    megapixels: float = 12.0,
) -> Fit:
    """Compute whether a bundle fits a budget, with the whole context in use.

    `context`: None for the model's own. `crops`: None for the most that a picture of usual proportions is cut into.
    Raises UsageError for a context that the model cannot have, UnsupportedError for a format of unknown footprint.
    """
    manifest = bundle.manifest
    spec = with_context(manifest.model, context)
    most = 1 + spec.image.tiling.max_crops
    use = Use(spec.decoder.context, crops or most, megapixels=megapixels, memory=memory, local=budget.local)
    other: Memory = "fast" if memory == "lean" else "lean"
    other_use = replace(use, memory=other)

    def taken(wanted: Use) -> float:
        return footprint(manifest, wanted).peak.bytes

    def context_fits(positions: int) -> bool:
        return taken(replace(use, context=positions)) <= budget.bytes

    def crops_fit(count: int) -> bool:
        return taken(replace(use, crops=count)) <= budget.bytes

    return Fit(
        bundle=bundle,
        budget=budget,
        use=use,
        footprint=footprint(manifest, use),
        short=footprint(manifest, replace(use, positions=prefill_positions(manifest))),
        prepared=footprint(manifest, replace(use, prepared=True)),
        other_use=other_use,
        other=footprint(manifest, other_use),
        largest_context=largest(context_fits, spec.image_tokens + 2, manifest.model.decoder.context),
        largest_crops=largest(crops_fit, 1, MOST_CROPS),
        per_crop=taken(replace(use, crops=use.crops + 1)) - taken(use),
    )


def largest(fits: Callable[[int], bool], least: int, most: int) -> int | None:
    """The largest number in least..most that fits, where all below one that fits do too; None where none does."""
    if not fits(least):
        return None
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least


def ram_bytes(word: str) -> int:
    """Bytes of "4GB" (10^9), "4GiB" (2^30), "512MB" or "512MiB"; raises UsageError for anything else."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?) ?([MG]i?B)", word.strip(), re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if not size:
        raise UsageError(f"--ram takes a size such as 4GB, 4GiB or 512MB, not '{word[:40]}'")
    return size


def device_budget(device: Device) -> Budget:
    """What an app may use of a device: a share of a phone, all but a reserve of a computer.

    Raises UsageError for a device whose memory is not known, and for a browser, whose runtime takes other memory.
    """
    if device.memory_gb is None:
        raise UsageError(f"the device '{device.name}' does not say its memory_gb; give --ram instead")
    if device.host == "browser":
        raise UsageError(
            f"the device '{device.name}' is a browser, whose footprint is not known; measure: vlmedge bench"
        )
    memory = device.memory_gb * 1e9
    if device.host in _PHONES:
        share = f"{_PHONE_SHARE:.0%} of {device.memory_gb:g} GB: systems of phones end an app that takes more"
        return Budget(memory * _PHONE_SHARE, f"{device.title}: {share}", local=False)
    reserve = max(memory * _RESERVE, _LEAST_RESERVE)
    reason = f"{device.title}: {device.memory_gb:g} GB less {reserve / 1e9:g} GB for the system and other programs"
    return Budget(max(0.0, memory - reserve), reason, local=device.host == "local")
