"""A quantization profile: ordered rules, read strictly from TOML, that give every tensor of a model a scheme."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, TypeAlias

from vlmedge.errors import UsageError, nearest
from vlmedge.limits import Limits
from vlmedge.records import decode, encode, read_toml

FOLDER = Path(__file__).parent / "profiles"
KvCache: TypeAlias = Literal["f32", "f16", "int8"]


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the values of one tensor are stored, in no format's words.

    `kind` "float": `bits` is 32 or 16. `kind` "int": `bits` per value, `group_size` neighbours in a row share a
    scale (0: the whole row does), `symmetric`: there is a scale and no offset. `activations`: bits of what the
    tensor is multiplied with, quantized at run time (8), or 0 for floats; formats whose kernels decide it themselves
    do not look at it. `native`: a format's own type for this tensor, by format name; it wins over the rest there.
    """

    kind: Literal["float", "int"]
    bits: int
    group_size: int = 0
    symmetric: bool = True
    activations: int = 0
    native: dict[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Refuse widths that no format can mean."""
        widths = (16, 32) if self.kind == "float" else tuple(range(1, 9))
        if self.bits not in widths:
            raise UsageError(
                f"a scheme of kind {self.kind} has {self.bits} bits; possible: {', '.join(map(str, widths))}"
            )
        if self.group_size < 0:
            raise UsageError(f"a scheme has the group_size {self.group_size}; it counts values, 0 means the whole row")
        if self.activations not in ((0, 8) if self.kind == "int" else (0,)):
            raise UsageError(
                f"a scheme of kind {self.kind} has {self.activations}-bit activations; "
                f"possible: {'0 (floats), 8' if self.kind == 'int' else '0 (floats)'}"
            )


@dataclass(frozen=True, slots=True)
class LayerSelector:
    """Some of a component's layers, numbered from 0 of n: those below `below`, those from `above` on, and every k-th.

    A bound is a number of layers, or a fraction of n as text ("7/8"), rounded down. `every` counts from `below`:
    layer i is taken where (i - below) % every == phase.
    """

    below: int | str = 0
    above: int | str = "1/1"
    every: int = 0
    phase: int = 0

    def __post_init__(self) -> None:
        """Refuse bounds that are no numbers."""
        for bound in (self.below, self.above):
            _layers(bound, 1)
        if self.every < 0 or not 0 <= self.phase < max(self.every, 1):
            raise UsageError(
                f"a layer selector has every = {self.every}, phase = {self.phase}; phase must be below every"
            )

    def picks(self, layer: int, layers: int) -> bool:
        """True where `layer` of `layers` is taken."""
        below = _layers(self.below, layers)
        if layer < below or layer >= _layers(self.above, layers):
            return True
        return self.every > 0 and (layer - below) % self.every == self.phase


@dataclass(frozen=True, slots=True)
class QuantRule:
    """One rule: tensors whose canonical name matches the glob `match` (`*` spans dots), in the selected layers."""

    match: str
    scheme: Scheme
    layers: LayerSelector | None = None

    def matches(self, name: str, layer: int | None, layers: int) -> bool:
        """True where the rule holds for a tensor in `layer` (None: in none) of a component of `layers`."""
        if not fnmatchcase(name, self.match):
            return False
        return self.layers is None or (layer is not None and self.layers.picks(layer, layers))


@dataclass(frozen=True, slots=True)
class QuantProfile:
    """A named list of rules. `kv_cache` is the type in which runtimes keep keys and values, where they can.

    `formats`: those that it is made for; empty: every one. `prefill`: rules for a second copy of the matrices in the
    decoder's layers, used for calls of many positions; empty: one copy does for all.
    `limits`: what verification lets pass; without any, everything is measured and nothing judged.
    """

    name: str
    summary: str
    rules: tuple[QuantRule, ...]
    kv_cache: KvCache = "f16"
    formats: tuple[str, ...] = ()
    prefill: tuple[QuantRule, ...] = ()
    limits: tuple[Limits, ...] = ()

    @property
    def digest(self) -> str:
        """A hash of all but the limits, so that two profiles of one name can be told apart."""
        rules = json.dumps(encode(replace(self, limits=())), sort_keys=True)
        return hashlib.sha256(rules.encode()).hexdigest()[:16]

    def limits_for(self, format: str) -> tuple[Limits, ...]:
        """The limits of a format: of each comparison those that name it, else those that name none."""
        out = {}
        for limits in sorted(self.limits, key=lambda found: len(found.formats)):
            if format in limits.formats or not limits.formats:
                out[limits.against] = limits
        return tuple(out.values())


def profile_names() -> tuple[str, ...]:
    """Names of the profiles that ship, in alphabetical order."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def profiles_for(format: str) -> tuple[str, ...]:
    """Names of the shipped profiles that a format has, in alphabetical order."""
    found = {name: load_profile(name).formats for name in profile_names()}
    return tuple(name for name, formats in found.items() if not formats or format in formats)


def load_profile(name: str) -> QuantProfile:
    """Return a shipped profile by name, or one by the path of its .toml file.

    Raises UsageError for an unknown name (with the nearest), an unreadable file, or an unknown key or value in it.
    """
    if name.endswith(".toml"):
        return _read(Path(name))
    if name not in profile_names():
        raise UsageError(f"unknown profile '{name}'{nearest(name, profile_names())} (or give a .toml file's path)")
    return _read(FOLDER / f"{name}.toml")


def _read(path: Path) -> QuantProfile:
    data = read_toml(path, "profile")
    if "name" in data:
        raise UsageError(f"{path.name} has the key 'name'; a profile is named by its file, drop the key")
    try:
        return decode(QuantProfile, {**data, "name": path.stem}, path.name)
    except UsageError as error:  # schemes and selectors check themselves and do not know their file
        text = str(error)
        raise UsageError(text if text.startswith(path.name) else f"{path.name}: {text}") from None


def _layers(bound: int | str, layers: int) -> int:
    """A bound in layers: a count as it is, a fraction "a/b" of `layers` rounded down."""
    if isinstance(bound, int):
        return bound
    above, slash, below = bound.partition("/")
    if not (slash and above.isdigit() and below.isdigit() and int(below)):
        raise UsageError(f'a layer bound is {bound!r}; it is a number of layers or a fraction such as "7/8"')
    return int(above) * layers // int(below)
