"""Questions about a scene with the answers that a person would accept; everything is computed from the scene."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vlmedge.demo.scene import COLORS, KINDS, Scene, Thing

Skill = Literal["query", "caption", "detect", "point"]
NUMBERS = ("No", "One", "Two", "Three", "Four", "Five")
LENGTHS = ("short", "normal", "long")
_GROUND = {"plain": "plain", "gradient": "gradient", "noise": "noisy", "stripes": "striped"}


@dataclass(frozen=True, slots=True)
class Question:
    """One task on a picture.

    `text` is the question, the object to find or the caption's length. `answers` are accepted texts, the first
    is the one to learn; `targets` index the things to find, from left to right. `refers` points at one thing
    by its centre ("point") or its box ("box").
    """

    kind: str
    skill: Skill
    text: str
    answers: tuple[str, ...] = ()
    targets: tuple[int, ...] = ()
    refers: tuple[Literal["point", "box"], int] | None = None


def questions(scene: Scene) -> tuple[Question, ...]:
    """Every kind of question that has one clear answer on this scene; a pure function of the scene."""
    rng = np.random.default_rng((scene.seed, scene.index, 2))
    found: list[Question | None] = [
        _count_all(scene, rng),
        _count_color(scene, rng),
        _count_kind(scene, rng),
        _refer(scene, rng),
    ]
    found += [_color(scene, rng), _shape(scene, rng), _where(scene, rng), _present(scene, rng), _absent(scene, rng)]
    found += [caption(scene, length) for length in LENGTHS]
    for skill in ("detect", "detect", "point"):
        found.append(find(scene, rng, skill))
    return tuple(dict.fromkeys(q for q in found if q is not None))


def caption(scene: Scene, length: str) -> Question:
    """The caption of one of the three lengths."""
    names = [f"a {t.name}" for t in scene.things]
    if length == "short":
        count = len(names)
        text = f"{NUMBERS[count]} shape{'s' * (count != 1)} on a {_GROUND[scene.background]} background."
    elif length == "normal":
        joined = ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]
        text = joined[0].upper() + joined[1:] + "."
    else:
        placed = ", ".join(f"{name} {_at(t)}" for name, t in zip(names, scene.things, strict=True))
        text = f"From left to right on a {_GROUND[scene.background]} background: {placed}."
    return Question(f"caption/{length}", "caption", length, (text,))


def matching(scene: Scene, text: str) -> tuple[int, ...]:
    """The things that a phrase names: `shape`, `circle`, `red shape`, `red circle`."""
    words = set(text.split())
    colors, kinds = words & set(COLORS), words & set(KINDS)

    def fits(thing: Thing) -> bool:
        return (not colors or thing.color in colors) and (not kinds or thing.kind in kinds)

    return tuple(i for i, thing in enumerate(scene.things) if fits(thing))


def find(scene: Scene, rng: np.random.Generator, skill: Skill) -> Question:
    """A thing, or several, to find; sometimes there is none."""
    thing = scene.things[int(rng.integers(len(scene.things)))]
    if rng.random() < 0.08:
        text = f"{_pick(rng, tuple(COLORS))} {_pick(rng, KINDS)}"
    else:
        text = ("shape", thing.kind, f"{thing.color} shape", thing.name)[int(rng.integers(4))]
    return Question(skill, skill, text, (), matching(scene, text))


def _at(thing: Thing) -> str:
    place = thing.place
    return "in the center" if place == "center" else f"{'on' if place in ('left', 'right') else 'at'} the {place}"


def _pick(rng: np.random.Generator, options: list[str] | tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _count_all(scene: Scene, rng: np.random.Generator) -> Question:
    text = _pick(rng, ("How many shapes are there?", "How many shapes do you see?"))
    return _count("count/all", text, len(scene.things))


def _count_color(scene: Scene, rng: np.random.Generator) -> Question:
    color = _present_or_not(rng, [t.color for t in scene.things], tuple(COLORS))
    return _count("count/color", f"How many {color} shapes are there?", len(matching(scene, color)))


def _count_kind(scene: Scene, rng: np.random.Generator) -> Question:
    kind = _present_or_not(rng, [t.kind for t in scene.things], KINDS)
    plural = f"{kind}es" if kind == "cross" else f"{kind}s"
    return _count("count/kind", f"How many {plural} are there?", len(matching(scene, kind)))


def _count(kind: str, text: str, count: int) -> Question:
    words = ("zero", "none") if count == 0 else (NUMBERS[count].lower(),)
    return Question(kind, "query", text, (str(count), *words))


def _present_or_not(rng: np.random.Generator, present: list[str], options: tuple[str, ...]) -> str:
    return _pick(rng, present) if rng.random() < 0.75 else _pick(rng, options)


def _color(scene: Scene, rng: np.random.Generator) -> Question | None:
    kinds = Counter(t.kind for t in scene.things)
    single = [t for t in scene.things if kinds[t.kind] == 1]
    if not single:
        return None
    thing = single[int(rng.integers(len(single)))]
    text = f"What {_pick(rng, ('color', 'colour'))} is the {thing.kind}?"
    return Question("color", "query", text, (thing.color,))


def _shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    colors = Counter(t.color for t in scene.things)
    single = [t for t in scene.things if colors[t.color] == 1]
    if not single:
        return None
    thing = single[int(rng.integers(len(single)))]
    text = f"{_pick(rng, ('Which', 'What'))} shape is {thing.color}?"
    return Question("shape", "query", text, (thing.kind, f"a {thing.kind}"))


def _where(scene: Scene, rng: np.random.Generator) -> Question | None:
    names = Counter(t.name for t in scene.things)
    single = [t for t in scene.things if names[t.name] == 1]
    if not single:
        return None
    thing = single[int(rng.integers(len(single)))]
    more = {"center": ("middle",), "top": ("top center",), "bottom": ("bottom center",)}.get(thing.place, ())
    return Question("where", "query", f"Where is the {thing.name}?", (thing.place, *more))


def _refer(scene: Scene, rng: np.random.Generator) -> Question:
    index = int(rng.integers(len(scene.things)))
    how: Literal["point", "box"] = "point" if rng.random() < 0.5 else "box"
    return Question("refer", "query", "What is this?", (f"a {scene.things[index].name}",), (), (how, index))


def _present(scene: Scene, rng: np.random.Generator) -> Question:
    thing = scene.things[int(rng.integers(len(scene.things)))]
    what = (thing.name, thing.kind, f"{thing.color} shape")[int(rng.choice(3, p=(0.6, 0.2, 0.2)))]
    return Question("exist", "query", f"Is there a {what}?", ("yes",))


def _absent(scene: Scene, rng: np.random.Generator) -> Question | None:
    thing = scene.things[int(rng.integers(len(scene.things)))]
    near = [f"{c} {thing.kind}" for c in COLORS] + [f"{thing.color} {k}" for k in KINDS] + list(KINDS)
    near += [f"{a.color} {b.kind}" for a in scene.things for b in scene.things] * 3
    absent = [what for what in near if not matching(scene, what)]
    return Question("exist", "query", f"Is there a {_pick(rng, absent)}?", ("no",)) if absent else None
