"""Procedural pictures of coloured shapes: a scene is a pure function of (seed, index); numpy and Pillow draw it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from vlmedge.session import U8

KINDS = ("circle", "square", "triangle", "cross")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 38, 38),
    "green": (38, 172, 58),
    "blue": (48, 78, 226),
    "yellow": (242, 216, 46),
    "purple": (160, 54, 196),
    "white": (246, 246, 246),
}
BACKGROUNDS = ("plain", "gradient", "noise", "stripes")
MOST = 5  # shapes in one picture

# A shape's centre keeps this far from the lines between left, middle and right, so that a person can tell.
_BAND = 0.05
_ORDER_GAP = 0.07  # between the centres' x, so that "from left to right" has one meaning
_OVERSAMPLE = 4
_ARM = 0.32  # half the width of the cross's arms
_CROSS = (
    *((-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)),
    *((_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)),
)
_OUTLINES: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)),
    "triangle": ((0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)),
    "cross": _CROSS,
}


@dataclass(frozen=True, slots=True)
class Box:
    """Edges in 0..1 of the picture's width and height."""

    x_min: float
    y_min: float
    x_max: float
    y_max: float

    @property
    def center(self) -> tuple[float, float]:
        """The middle (x, y)."""
        return (self.x_min + self.x_max) / 2, (self.y_min + self.y_max) / 2

    @property
    def size(self) -> tuple[float, float]:
        """Width and height."""
        return self.x_max - self.x_min, self.y_max - self.y_min


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape: its outline's corners (or centre and radius) in pixels, and the box around it."""

    kind: str
    color: str
    x: float
    y: float
    radius: float
    angle: float
    box: Box

    @property
    def name(self) -> str:
        """Colour and kind: `red circle`."""
        return f"{self.color} {self.kind}"

    @property
    def place(self) -> str:
        """Where the centre lies on a 3 x 3 grid: `top left`, `top`, ..., `center`, ..., `bottom right`."""
        x, y = self.box.center
        row, column = ("top", "", "bottom")[int(y * 3)], ("left", "", "right")[int(x * 3)]
        return f"{row} {column}".strip() or "center"

    def holds(self, x: float, y: float) -> bool:
        """Tell whether a point in pixels lies on the shape."""
        if self.kind == "circle":
            return math.hypot(x - self.x, y - self.y) <= self.radius
        corners = _outline(self.kind, self.x, self.y, self.radius, self.angle)
        inside = False
        for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
            if (ay > y) != (by > y) and x < ax + (y - ay) / (by - ay) * (bx - ax):
                inside = not inside
        return inside


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture's content; `things` run from left to right."""

    seed: int
    index: int
    height: int
    width: int
    background: str
    things: tuple[Thing, ...]


def scene(seed: int, index: int, sizes: str = "mixed") -> Scene:
    """Make up picture `index` of the set `seed`. `sizes`: "mixed", "single" (one crop of 112) or "tiled"."""
    rng = np.random.default_rng((seed, index))
    height, width = _dimensions(rng, sizes)
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    wanted = int(rng.choice(MOST, p=(0.1, 0.2, 0.25, 0.25, 0.2))) + 1
    things: list[Thing] = []
    for _ in range(400):
        if len(things) == wanted:
            break
        thing = _thing(rng, height, width, things)
        if _clear(thing, things, height, width):
            things.append(thing)
    return Scene(seed, index, height, width, background, tuple(sorted(things, key=lambda t: t.box.center[0])))


def draw(scene: Scene) -> U8:
    """The picture, uint8 [height, width, 3]; the same bytes every time."""
    rng = np.random.default_rng((scene.seed, scene.index, 1))
    canvas = _background(rng, scene)
    for thing in scene.things:
        color = np.array(COLORS[thing.color], np.float32) + rng.uniform(-14, 14, 3).astype(np.float32)
        _paint(canvas, thing, color)
    canvas += rng.normal(0, 2.5, canvas.shape).astype(np.float32)
    picture: U8 = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    return picture


def _dimensions(rng: np.random.Generator, sizes: str) -> tuple[int, int]:
    tiled = sizes == "tiled" or (sizes == "mixed" and rng.random() < 0.17)
    if tiled:
        low, high = ((150, 150), (205, 205)), ((165, 235), (200, 290))
        long = ((116, 380), (134, 500))
        (a, b), (c, d) = (low, high, long)[rng.choice(3, p=(0.4, 0.4, 0.2))]
        height, width = int(rng.integers(a, c + 1)), int(rng.integers(b, d + 1))
    else:
        part = rng.choice(3, p=(0.7, 0.15, 0.15))
        least, most = ((94, 112), (64, 93), (100, 112))[part]
        height, width = (int(n) for n in rng.integers(least, most + 1, 2))
        if part == 2:
            width = int(rng.integers(113, 165))
    return (width, height) if rng.random() < 0.5 else (height, width)


def _thing(rng: np.random.Generator, height: int, width: int, others: list[Thing]) -> Thing:
    kind, color = KINDS[rng.integers(len(KINDS))], str(rng.choice(list(COLORS)))
    if others and rng.random() < 0.25:
        kind = others[0].kind
    if others and rng.random() < 0.2:
        color = others[0].color
    short, long = sorted((height, width))
    least, most = (0.1, 0.2) if long > 2 * short else (0.065, 0.15) if short > 112 else (0.08, 0.155)
    radius = float(rng.uniform(least, most)) * short
    angle = float(rng.uniform(-0.25, 0.25))
    edge = radius + 2
    x, y = float(rng.uniform(edge, width - edge)), float(rng.uniform(edge, height - edge))
    return Thing(kind, color, x, y, radius, angle, _box(kind, x, y, radius, angle, height, width))


def _clear(thing: Thing, others: list[Thing], height: int, width: int) -> bool:
    x, y = thing.box.center
    if any(abs(at - line) < _BAND for at in (x, y) for line in (1 / 3, 2 / 3)):
        return False
    if thing.box.x_min < 0 or thing.box.y_min < 0 or thing.box.x_max > 1 or thing.box.y_max > 1:
        return False
    return all(abs(x - other.box.center[0]) >= _ORDER_GAP and _apart(thing, other) for other in others)


def _apart(one: Thing, two: Thing) -> bool:
    return math.hypot(one.x - two.x, one.y - two.y) > 1.1 * (one.radius + two.radius)


def _outline(kind: str, x: float, y: float, radius: float, angle: float) -> list[tuple[float, float]]:
    cos, sin = radius * math.cos(angle), radius * math.sin(angle)
    return [(x + cos * a - sin * b, y + sin * a + cos * b) for a, b in _OUTLINES[kind]]


def _box(kind: str, x: float, y: float, radius: float, angle: float, height: int, width: int) -> Box:
    if kind == "circle":
        return Box((x - radius) / width, (y - radius) / height, (x + radius) / width, (y + radius) / height)
    xs, ys = zip(*_outline(kind, x, y, radius, angle), strict=True)
    return Box(min(xs) / width, min(ys) / height, max(xs) / width, max(ys) / height)


def _paint(canvas: np.ndarray[tuple[int, int, int], np.dtype[np.float32]], thing: Thing, color: np.ndarray) -> None:
    reach = 1.45 * thing.radius + 2
    left, top = max(0, math.floor(thing.x - reach)), max(0, math.floor(thing.y - reach))
    right = min(canvas.shape[1], math.ceil(thing.x + reach))
    bottom = min(canvas.shape[0], math.ceil(thing.y + reach))
    mask = Image.new("L", ((right - left) * _OVERSAMPLE, (bottom - top) * _OVERSAMPLE))
    pen = ImageDraw.Draw(mask)
    x, y = thing.x - left, thing.y - top
    if thing.kind == "circle":
        edges = (x - thing.radius, y - thing.radius, x + thing.radius, y + thing.radius)
        pen.ellipse([e * _OVERSAMPLE for e in edges], fill=255)
    else:
        corners = _outline(thing.kind, x, y, thing.radius, thing.angle)
        pen.polygon([(a * _OVERSAMPLE, b * _OVERSAMPLE) for a, b in corners], fill=255)
    small = mask.resize((right - left, bottom - top), Image.Resampling.BOX)
    alpha = np.asarray(small, np.float32)[..., None] / 255
    part = canvas[top:bottom, left:right]
    part += alpha * (color - part)


def _background(rng: np.random.Generator, scene: Scene) -> np.ndarray[tuple[int, int, int], np.dtype[np.float32]]:
    h, w = scene.height, scene.width
    tint = rng.uniform(-14, 14, 3).astype(np.float32)
    base = float(rng.uniform(60, 125))
    light = np.full((h, w), base, np.float32)
    turn = float(rng.uniform(0, 2 * math.pi))
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    if scene.background == "gradient":
        slope = math.cos(turn) * (x / w - 0.5) + math.sin(turn) * (y / h - 0.5)
        light += float(rng.uniform(80, 110)) * slope / (abs(math.cos(turn)) + abs(math.sin(turn)))
    elif scene.background == "stripes":
        period = float(rng.uniform(0.1, 0.16)) * min(h, w)
        along = math.cos(turn) * x + math.sin(turn) * y
        light += float(rng.uniform(14, 22)) * np.sign(np.sin(2 * math.pi * along / period))
    canvas = light[..., None] + tint
    if scene.background == "noise":
        canvas = canvas + rng.normal(0, rng.uniform(18, 28), (h, w, 3)).astype(np.float32)
    return canvas.astype(np.float32)
