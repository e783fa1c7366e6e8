"""The demo: made-up pictures of coloured shapes, tiny checkpoints trained on them, and their trainer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmedge.errors import UsageError, nearest

_CHECKPOINTS = Path(__file__).parent / "checkpoints"
_PICTURES = Path(__file__).parent / "pictures"


def demo_names() -> tuple[str, ...]:
    """The names after `demo:` of the shipped checkpoints."""
    return tuple(sorted(path.parent.name for path in _CHECKPOINTS.glob("*/config.json")))


def demo_folder(name: str) -> Path:
    """The checkpoint folder of `demo:NAME`; raises UsageError, with the nearest name, where there is none."""
    if name not in demo_names():
        raise UsageError(f"there is no demo checkpoint '{name}'{nearest(name, demo_names())}")
    return _CHECKPOINTS / name


def demo_picture(name: str) -> Path:
    """The file of a shipped picture, with or without `.png`; raises UsageError, with the nearest name, if unknown."""
    known = [path.stem for path in _PICTURES.glob("*.png")]
    if name.removesuffix(".png") not in known:
        raise UsageError(f"there is no demo picture '{name}'{nearest(name, known)}")
    return _PICTURES / f"{name.removesuffix('.png')}.png"


def demo_answers() -> list[dict[str, Any]]:
    """What is known about the shipped pictures.

    One entry a picture: `picture` (file name), `size` (width, height), `tasks`, each with `kind`, `skill`,
    `text` (question, object or caption length) and `answers` (accepted texts, the expected one first), `boxes`
    (x_min, y_min, x_max, y_max) or `points` (x, y) in 0..1.
    """
    found: list[dict[str, Any]] = json.loads((_PICTURES / "answers.json").read_text(encoding="utf-8"))
    return found


def demo_questions() -> Iterator[tuple[Path, str, str]]:
    """A few questions about each shipped picture: its file, the question, the right answer."""
    for entry in demo_answers():
        for task in entry["tasks"]:
            if task["skill"] == "query":
                yield demo_picture(entry["picture"]), task["text"], task["answers"][0]
