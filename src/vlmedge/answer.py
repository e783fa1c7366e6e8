"""What a skill gives back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Box:
    """A box in fractions of the picture's width and height; may reach beyond 0..1, as the original's may."""

    x_min: float
    y_min: float
    x_max: float
    y_max: float


@dataclass(frozen=True, slots=True)
class Point:
    """A point in fractions of the picture's width and height."""

    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Grounding:
    """Characters start..end of a reasoning text, and the points that they speak of."""

    start: int
    end: int
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What the model thought before it answered."""

    text: str
    tokens: tuple[int, ...]
    grounding: tuple[Grounding, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer.

    `tokens`: the generated ids, the end token included where one ended it. `prompt_tokens` counts positions
    that are not the picture's. `timings_ms`: tokenize, image (file to pixels), preprocess (crops), vision, project,
    prefill (picture), prompt, first_token (from the picture's file in hand), decode, total; a stage that was not needed
    is absent. `peak_rss_mb` is the process's.
    """

    skill: str
    text: str = ""
    tokens: tuple[int, ...] = ()
    prompt_tokens: int = 0
    image_tokens: int = 0
    crops: int = 0
    boxes: tuple[Box, ...] = ()
    points: tuple[Point, ...] = ()
    finish: Literal["stop", "length"] = "stop"
    runtime: str = ""
    reasoning: Reasoning | None = None
    timings_ms: dict[str, float] = field(default_factory=dict)
    peak_rss_mb: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The answer as JSON data; `reasoning` only where there is one."""
        data = asdict(self)
        if self.reasoning is None:
            del data["reasoning"]
        return data
