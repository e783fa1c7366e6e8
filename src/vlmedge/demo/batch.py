"""Training batches: several questions on one picture in one sequence; a pure function of (seed, step)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from vlmedge import imaging
from vlmedge.demo.questions import Question, find, questions
from vlmedge.demo.scene import COLORS, KINDS, Scene, draw, scene
from vlmedge.session import F32, U8, Grid
from vlmedge.spec import Ids, Image, ModelSpec, References, Text

TOKEN, COORDINATE, SIZE = 0, 1, 2
NONE = -100  # no target here
PADDING = -1  # no branch
ANOTHER = 5  # the token that stands for "one more object"; any but the end token would do

I64 = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(slots=True)
class Branch:
    """One question with its answer as decoder inputs and, for each input, what is to follow it.

    `modes` says whether an input is a token, a coordinate (`values[0]`) or a size (`values`). `next_token`,
    `next_coordinate` and `next_size` are targets (NONE or NaN where there is none).
    """

    question: Question
    ids: list[int] = field(default_factory=list)
    modes: list[int] = field(default_factory=list)
    values: list[tuple[float, float]] = field(default_factory=list)
    next_token: list[int] = field(default_factory=list)
    next_coordinate: list[float] = field(default_factory=list)
    next_size: list[tuple[float, float]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def tokens(self, ids: list[int]) -> None:
        """Append token inputs."""
        for i in ids:
            self._append(i, TOKEN, (0.0, 0.0))

    def coordinate(self, value: float) -> None:
        """Append a coordinate input."""
        self._append(ANOTHER, COORDINATE, (value, 0.0))

    def size(self, size: tuple[float, float]) -> None:
        """Append a size input."""
        self._append(ANOTHER, SIZE, size)

    def _append(self, token: int, mode: int, values: tuple[float, float]) -> None:
        self.ids.append(token)
        self.modes.append(mode)
        self.values.append(values)
        self.next_token.append(NONE)
        self.next_coordinate.append(np.nan)
        self.next_size.append((np.nan, np.nan))


@dataclass(slots=True)
class Batch:
    """Arrays of B pictures in sequences of T positions, the prefix (BOS and image tokens) first.

    `crops` uint8 [n, size, size, 3]: B global crops, then the local ones of the pictures in `tiled`, (picture,
    grid) each. `ids`, `modes`, `values` [B, T(, 2)] and `next_*` are those of `Branch`. `positions` [B, T] restart
    after the prefix for every question; `branch` [B, T] numbers them (0 the prefix, -1 padding). For the auxiliary
    head, patch by patch: `kinds`, `colors` [B, tokens] of the thing on it (0 none), `geometry` [B, tokens, 4] its
    centre relative to the patch's, in patches, and its log2 width and height.
    """

    crops: U8
    tiled: list[tuple[int, Grid]]
    ids: I64
    modes: I64
    values: F32
    positions: I64
    branch: I64
    next_token: I64
    next_coordinate: F32
    next_size: F32
    kinds: I64
    colors: I64
    geometry: F32
    questions: list[list[Question]]


def branch(spec: ModelSpec, words: Tokenizer, scene: Scene, question: Question) -> Branch:
    """Lay out one question after the image prefix, by the checkpoint's own template, with its answer."""
    made = Branch(question)
    name = f"caption/{question.text}" if question.skill == "caption" else question.skill
    for part in spec.prompt.templates[name][2:]:
        if isinstance(part, Ids):
            made.tokens(list(part.ids))
        elif isinstance(part, Text):
            text = part.text.format(question=question.text, object=question.text)
            made.tokens(words.encode(text, add_special_tokens=False).ids)
        elif isinstance(part, References):
            _refer(made, scene, question)
        else:
            assert not isinstance(part, Image)
    if question.skill in ("query", "caption"):
        _answer(made, words, question.answers[0], spec.prompt.stop[0])
    else:
        _find(made, scene, question, spec.prompt.stop[0])
    return made


def _refer(made: Branch, scene: Scene, question: Question) -> None:
    if question.refers is None:
        return
    how, index = question.refers
    box = scene.things[index].box
    for value in box.center:
        made.coordinate(value)
    if how == "box":
        made.size(box.size)


def _answer(made: Branch, words: Tokenizer, text: str, stop: int) -> None:
    ids = words.encode(text, add_special_tokens=False).ids
    made.next_token[-1] = ids[0]
    made.tokens(ids)
    made.next_token[-len(ids) :] = [*ids[1:], stop]


def _find(made: Branch, scene: Scene, question: Question, stop: int) -> None:
    for index in question.targets:
        box = scene.things[index].box
        x, y = box.center
        made.next_token[-1], made.next_coordinate[-1] = ANOTHER, x
        made.coordinate(x)
        made.next_coordinate[-1] = y
        made.coordinate(y)
        if question.skill == "detect":
            made.next_size[-1] = box.size
            made.size(box.size)
    made.next_token[-1] = stop


def batch(
    spec: ModelSpec, words: Tokenizer, scenes: list[Scene], length: int, seed: int | None = None, extra: int = 0
) -> Batch:
    """Pack the scenes' questions into sequences of at most `length`; with a `seed`, shuffled, and as many as fit.

    `extra`: so many more things to find in each picture.
    """
    crops = [imaging.crop(draw(s), spec.image) for s in scenes]
    tiled = [(i, c.tiling) for i, c in enumerate(crops) if c.tiling != (1, 1)]
    pixels = np.concatenate([np.stack([c.pixels[0] for c in crops]), *(crops[i].pixels[1:] for i, _ in tiled)])
    rows = [_fill(spec, words, s, length, seed, extra) for s in scenes]
    prefix = 1 + spec.image_tokens
    longest = prefix + max(sum(map(len, row)) for row in rows)
    made = _empty(len(scenes), -(-longest // 8) * 8, prefix)
    for i, row in enumerate(rows):
        _place(made, i, row, prefix)
    aux = [_cells(spec, s) for s in scenes]
    made.crops, made.tiled = pixels, tiled
    made.kinds, made.colors, made.geometry = (np.stack(part) for part in zip(*aux, strict=True))
    return made


def step_batch(
    spec: ModelSpec, words: Tokenizer, seed: int, step: int, size: int, length: int, extra: int = 0
) -> Batch:
    """The batch of one training step."""
    scenes = [scene(seed, step * size + i) for i in range(size)]
    return batch(spec, words, scenes, length, seed, extra)


def _fill(spec: ModelSpec, words: Tokenizer, scene: Scene, length: int, seed: int | None, extra: int) -> list[Branch]:
    asked = list(questions(scene))
    if seed is None:
        return [branch(spec, words, scene, q) for q in asked]
    rng = np.random.default_rng((seed, scene.index, 3))
    asked += [find(scene, rng, "detect" if i % 2 == 0 else "point") for i in range(extra)]
    room, taken = length - 1 - spec.image_tokens, []
    for i in rng.permutation(len(asked)):
        made = branch(spec, words, scene, asked[i])
        if len(made) <= room:
            taken.append(made)
            room -= len(made)
    return taken


def _empty(pictures: int, length: int, prefix: int) -> Batch:
    def whole(value: int) -> I64:
        return np.full((pictures, length), value, np.int64)

    branches = whole(PADDING)
    branches[:, :prefix] = 0
    positions = np.broadcast_to(np.minimum(np.arange(length), prefix), (pictures, length)).copy()
    nothing = np.zeros((0,), np.int64)
    return Batch(
        crops=np.zeros((0, 0, 0, 3), np.uint8),
        tiled=[],
        ids=whole(0),
        modes=whole(TOKEN),
        values=np.zeros((pictures, length, 2), np.float32),
        positions=positions,
        branch=branches,
        next_token=whole(NONE),
        next_coordinate=np.full((pictures, length), np.nan, np.float32),
        next_size=np.full((pictures, length, 2), np.nan, np.float32),
        kinds=nothing,
        colors=nothing,
        geometry=np.zeros((0,), np.float32),
        questions=[[] for _ in range(pictures)],
    )


def _place(made: Batch, i: int, row: list[Branch], prefix: int) -> None:
    at = prefix
    for number, part in enumerate(row, 1):
        span = slice(at, at + len(part))
        made.ids[i, span], made.modes[i, span], made.values[i, span] = part.ids, part.modes, part.values
        made.positions[i, span] = np.arange(prefix, prefix + len(part))
        made.branch[i, span] = number
        made.next_token[i, span] = part.next_token
        made.next_coordinate[i, span], made.next_size[i, span] = part.next_coordinate, part.next_size
        made.questions[i].append(part.question)
        at += len(part)


def _cells(spec: ModelSpec, scene: Scene) -> tuple[I64, I64, F32]:
    side = spec.vision.grid
    kinds, colors = (np.zeros((side, side), np.int64) for _ in range(2))
    geometry = np.full((side, side, 4), np.nan, np.float32)
    middle = (np.arange(side) + 0.5) / side
    for thing in scene.things:
        box, (x, y), (w, h) = thing.box, thing.box.center, thing.box.size
        inside = ((middle > box.y_min) & (middle < box.y_max))[:, None] & ((middle > box.x_min) & (middle < box.x_max))
        inside[int(y * side), int(x * side)] = True
        rows, columns = np.nonzero(inside)
        kinds[rows, columns] = 1 + KINDS.index(thing.kind)
        colors[rows, columns] = 1 + list(COLORS).index(thing.color)
        offset = np.stack([x * side - columns - 0.5, y * side - rows - 0.5], -1)
        geometry[rows, columns, :2] = offset
        geometry[rows, columns, 2:] = np.log2([w * side, h * side])
    return kinds.ravel(), colors.ravel(), geometry.reshape(-1, 4)
