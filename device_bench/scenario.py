"""A scenario: the pictures, the questions and how often they are asked; one TOML file, read strictly."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from PIL import Image

from vlmedge.device_bench.job import Ask, Work
from vlmedge.errors import ImageError, UsageError, nearest
from vlmedge.picture import check_picture
from vlmedge.records import decode, read_toml

FOLDER: Final = Path(__file__).parent / "scenarios"
IMAGES: Final = Path(__file__).parent / "images"


@dataclass(frozen=True, slots=True)
class Scenario:
    """What every model of a run is asked; see `job.Work`. `rounds`: fresh processes of each variant."""

    name: str
    title: str
    asks: tuple[Ask, ...]
    tokens: int
    warmup: int = 1
    repeat: int = 3
    min_seconds: float = 0.0
    rounds: int = 3

    def __post_init__(self) -> None:
        """Refuse numbers that measure nothing, and asks that cannot be told apart."""
        least = {"tokens": 2, "warmup": 0, "repeat": 1, "min_seconds": 0, "rounds": 1}
        for key, bound in least.items():
            if not bound <= getattr(self, key) < math.inf:
                raise UsageError(
                    f"the scenario '{self.name}' has {key} = {getattr(self, key)}; it must be at least {bound}"
                )
        names = [ask.name for ask in self.asks]
        if not names:
            raise UsageError(f"the scenario '{self.name}' asks nothing; add an [[ask]] table")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UsageError(f"the scenario '{self.name}' has two asks named '{twice}'")

    @property
    def work(self) -> Work:
        """What a job does with it."""
        return Work(self.name, self.asks, self.tokens, self.warmup, self.repeat, self.min_seconds)

    def changed(
        self,
        *,
        rounds: int | None = None,
        repeat: int | None = None,
        min_seconds: float | None = None,
        tokens: int | None = None,
    ) -> Scenario:
        """The scenario with other numbers, where they are given. Raises UsageError for those that measure nothing."""
        return replace(
            self,
            rounds=self.rounds if rounds is None else rounds,
            repeat=self.repeat if repeat is None else repeat,
            min_seconds=self.min_seconds if min_seconds is None else min_seconds,
            tokens=self.tokens if tokens is None else tokens,
        )


@dataclass(frozen=True, slots=True)
class _AskTable:
    name: str
    picture: str
    question: str = ""


@dataclass(frozen=True, slots=True)
class _File:
    """What the TOML says."""

    title: str
    ask: tuple[_AskTable, ...]
    tokens: int
    warmup: int = 1
    repeat: int = 3
    min_seconds: float = 0.0
    rounds: int = 3


def scenario_names() -> tuple[str, ...]:
    """Names of the scenarios that ship, in alphabetical order."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def load_scenario(name: str) -> Scenario:
    """Return a shipped scenario by name, or one by the path of its .toml file; pictures are looked at, not decoded.

    Raises UsageError for an unknown name (with the nearest), a file that cannot be read, an unknown key or value in it
    or a picture that is not there, ImageError for one that is none.
    """
    if name.endswith(".toml"):
        return _read(Path(name))
    if name not in scenario_names():
        raise UsageError(f"unknown scenario '{name}'{nearest(name, scenario_names())} (or give a .toml file's path)")
    return _read(FOLDER / f"{name}.toml")


def _read(path: Path) -> Scenario:
    data = read_toml(path, "scenario")
    file = decode(_File, data, path.name)
    asks = tuple(_ask(table, path) for table in file.ask)
    return Scenario(path.stem, file.title, asks, file.tokens, file.warmup, file.repeat, file.min_seconds, file.rounds)


def _ask(table: _AskTable, scenario: Path) -> Ask:
    picture = _picture(table.picture, scenario)
    check_picture(picture)
    try:
        sha256 = hashlib.sha256(picture.read_bytes()).hexdigest()
        with Image.open(picture) as image:
            width, height = image.size
    except OSError as error:
        raise ImageError(f"{picture} cannot be read: {error.strerror or error}") from None
    return Ask(table.name, str(picture), sha256, width, height, table.question)


def _picture(name: str, scenario: Path) -> Path:
    """Beside the scenario, or one that ships."""
    beside, shipped = Path(os.path.abspath(scenario.parent / name)), IMAGES / name
    for found in (beside, shipped):
        if os.path.lexists(found):
            return found
    raise UsageError(f"{scenario.name} names the picture '{name}'; it is neither at {beside} nor among those that ship")
