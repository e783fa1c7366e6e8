"""The plan of a run: which models are run in which ways on which devices, and what cannot be run there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from vlmedge.device_bench.hosts.host import Units
from vlmedge.device_bench.job import Variant
from vlmedge.device_bench.models import Model
from vlmedge.device_bench.scenario import Scenario
from vlmedge.errors import UsageError, nearest
from vlmedge.records import encode
from vlmedge.runtimes import RUNTIMES

CPU: Final = "cpu"
ORIGINAL: Final = "original"
CHECKPOINT: Final = "checkpoint"
# A runtime of other machines than this, and what it loads: an iPhone's.
ELSEWHERE: Final = {"coreml": "coreml"}


@dataclass(frozen=True, slots=True)
class Place:
    """A device as the plan sees it: its name in the records, what can compute there, the threads that it is given."""

    device: str
    units: Units
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """How models are run. `runtime`: of the bundles whose format it loads. `units`: () for all that are there."""

    runtime: str | None = None
    units: tuple[str, ...] = ()
    threads: int | None = None
    memory: Literal["fast", "lean"] = "fast"
    context: int | None = None
    affinity: tuple[int, ...] = ()
    allow_pickle: bool = False


@dataclass(frozen=True, slots=True)
class Seat:
    """A variant on a device."""

    device: str
    variant: Variant


@dataclass(frozen=True, slots=True)
class Absent:
    """A variant that cannot be run, and why. `asked`: it is what the user wants; else its unit is only listed."""

    seat: Seat
    reason: str
    asked: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does. `reference`: the original in float32, whose answers are the truth; None without an original.

    `tune`: find the best thread counts first. `minutes`: of the sustain jobs, 0 for none.
    """

    scenario: Scenario
    seats: tuple[Seat, ...]
    absent: tuple[Absent, ...] = ()
    reference: Seat | None = None
    tune: bool = False
    minutes: float = 0.0

    @property
    def devices(self) -> tuple[str, ...]:
        """Those that have something to run, in order."""
        return tuple(dict.fromkeys(seat.device for seat in self.seats))

    @property
    def digest(self) -> str:
        """Sixteen digits that are equal for plans whose records may stand together: more rounds are more of the same.

        Where the files lie does not matter, nor what cannot be run, nor a sustained curve beside the rest.
        """
        asks = tuple(ask.placeless for ask in self.scenario.asks)
        bare = replace(
            self,
            scenario=replace(self.scenario, asks=asks, rounds=1),
            minutes=0.0,
            seats=tuple(map(_bare, self.seats)),
            absent=(),
            reference=_bare(self.reference) if self.reference else None,
        )
        return hashlib.sha256(json.dumps(encode(bare), sort_keys=True).encode()).hexdigest()[:16]


def make_plan(
    models: Sequence[Model],
    places: Sequence[Place],
    scenario: Scenario,
    options: Options | None = None,
    *,
    tune: bool = False,
    minutes: float = 0.0,
    here: Place | None = None,
) -> Plan:
    """What is run where. `here`: runs the original for its answers where no device does.

    Raises UsageError for a runtime or a unit that exists nowhere.
    """
    options = options or Options()
    _check(models, places, options)
    seats: list[Seat] = []
    absent = _Absents()
    for place in places:
        for model in models:
            _place(model, place, options, seats, absent)
    original = next((model for model in models if model.is_original), None)
    reference = _reference(original, [*places, *([here] if here else [])], options) if original else None
    return Plan(scenario, tuple(seats), tuple(absent.found), reference, tune, minutes)


@dataclass(slots=True)
class _Absents:
    found: list[Absent] = field(default_factory=list)

    def add(self, absent: Absent) -> None:
        """A unit that nobody asked for is listed once per device and runtime, not once per model."""
        key = _key(absent.seat)
        if absent.asked or all(_key(other.seat) != key for other in self.found):
            self.found.append(absent)


def _key(seat: Seat) -> tuple[str, str, str]:
    return seat.device, seat.variant.runtime, seat.variant.unit


def _place(model: Model, place: Place, options: Options, seats: list[Seat], absent: _Absents) -> None:
    """Every way to run a model on a device."""
    runtimes = _runtimes(model, place, options)
    if not runtimes:
        for variant in _variants(model, "", CPU, place, options):
            has = ", ".join(sorted(place.units)) or "no runtime"
            reason = f"{place.device} has nothing that runs {_kind(model)}; it has {has}"
            absent.add(Absent(Seat(place.device, variant), reason, True))
    for runtime in runtimes:
        for unit, why, asked in _units(runtime, place.units[runtime], options):
            for variant in _variants(model, runtime, unit, place, options):
                seat = Seat(place.device, variant)
                absent.add(Absent(seat, why, asked)) if why else seats.append(seat)


def _runtimes(model: Model, place: Place, options: Options) -> list[str]:
    """The one that runs the model there: the one asked for, else the first with a unit, else the first; [] for none."""
    known = [runtime for runtime, units in place.units.items() if units and _loads(runtime) == model.subject.format]
    if options.runtime in known:
        return [options.runtime]
    usable = [runtime for runtime in known if not all(place.units[runtime].values())]
    return (usable or known)[:1]


def _units(runtime: str, units: Mapping[str, str], options: Options) -> Iterator[tuple[str, str, bool]]:
    """(unit, why it cannot be used or "", was it asked for)."""
    nothing = all(units.values())  # then the first stands for the model
    for number, unit in enumerate(options.units or units):
        if unit in units:
            yield unit, units[unit], bool(options.units) or (nothing and number == 0)
        else:
            yield unit, f"the runtime '{runtime}' has no unit '{unit}'; it has {', '.join(units)}", True


def _variants(model: Model, runtime: str, unit: str, place: Place, options: Options) -> Iterator[Variant]:
    subject = model.subject
    for dtype in model.dtypes:
        words = [ORIGINAL if model.is_original else subject.label, dtype, "" if unit == CPU else unit]
        if options.runtime is None and runtime in _others(subject.format):
            words.append(runtime)
        yield Variant(
            label=" ".join(word for word in words if word),
            source=subject.source,
            digest=subject.digest,
            format=subject.format,
            profile=subject.profile,
            bytes=subject.bytes,
            bits_per_weight=model.bits_per_weight,
            runtime=runtime,
            unit=unit,
            dtype=dtype,
            memory=options.memory,
            threads=options.threads or place.threads,
            context=options.context,
            affinity=options.affinity,
            allow_pickle=options.allow_pickle and not subject.is_bundle,
        )


def _reference(original: Model, places: Iterable[Place], options: Options) -> Seat | None:
    """The original in float32 on the first device that runs it."""
    for place in places:
        for runtime in _runtimes(original, place, options):
            if place.units[runtime].get(CPU) == "":
                only = replace(original, dtypes=("f32",))
                return Seat(place.device, next(_variants(only, runtime, CPU, place, options)))
    return None


def runs_original(place: Place) -> bool:
    """Can the original give its answers there?"""
    return any(_loads(runtime) == CHECKPOINT and units.get(CPU) == "" for runtime, units in place.units.items())


def _loads(runtime: str) -> str:
    """The format that a runtime loads; "" for one that this version does not know."""
    if runtime in RUNTIMES:
        return RUNTIMES[runtime].loads
    return ELSEWHERE.get(runtime, "")


def _others(format: str) -> list[str]:
    """A format's runtimes but for the first, which is the one that goes without saying."""
    return [runtime for runtime in RUNTIMES if RUNTIMES[runtime].loads == format][1:]


def _kind(model: Model) -> str:
    return f"{model.subject.format} bundles" if model.subject.is_bundle else "checkpoints (PyTorch)"


def _check(models: Sequence[Model], places: Sequence[Place], options: Options) -> None:
    """Names that mean nothing anywhere are mistakes, not absences."""
    if options.runtime is not None:
        known = {*RUNTIMES, *(runtime for place in places for runtime in place.units)}
        if options.runtime not in known:
            raise UsageError(f"unknown runtime '{options.runtime}'{nearest(options.runtime, known)}")
        loads = _loads(options.runtime)
        if all(model.subject.format != loads for model in models):
            runs = "checkpoints" if loads == CHECKPOINT else f"{loads} bundles"
            raise UsageError(f"the runtime '{options.runtime}' runs {runs}; none is named")
    units = {unit for place in places for found in place.units.values() for unit in found}
    for unit in options.units:
        if unit not in units:
            raise UsageError(f"no runtime has the unit '{unit}'{nearest(unit, units)}")


def _bare(seat: Seat) -> Seat:
    """A seat without the place where its model lies."""
    return replace(seat, variant=seat.variant.placeless)
