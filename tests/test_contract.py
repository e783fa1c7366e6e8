"""The manifest's words about pictures are enough: a second implementation made from them alone gives the same bytes.

Everything below `# ---- from the words` uses numpy, the numbers and the sentences of `manifest["image"]`, and neither
Pillow nor `vlmedge.imaging`.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from skimage import data

from vlmedge import imaging
from vlmedge.bundle import MANIFEST
from vlmedge.contract import image_contract
from vlmedge.parity.pictures import pattern
from vlmedge.spec import ImageSpec, OverlapCrops

LANCZOS = ImageSpec(378, 14, (0.5, 0.4, 0.3), (0.5, 0.25, 0.125), "lanczos", OverlapCrops(12, 4))
BICUBIC = ImageSpec(112, 14, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", OverlapCrops(6, 1))
SPECS = pytest.mark.parametrize("spec", [LANCZOS, BICUBIC], ids=lambda s: s.resample)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)


def photo(name: str) -> np.ndarray:
    return np.ascontiguousarray(getattr(data, name)()[:, :, :3])


@SPECS
@pytest.mark.parametrize(
    "picture",
    [
        pattern(1, 1),
        pattern(3, 500),
        pattern(378, 378),
        pattern(379, 800),
        noise(700, 500),
        noise(112, 1000),
        (noise(150, 450) > 127).astype(np.uint8) * 255,
        photo("coffee"),
        photo("astronaut"),
    ],
    ids=lambda p: "x".join(map(str, p.shape[:2])),
)
def test_crops_from_the_words(spec, picture):
    tiling, crops = cut(picture, image_contract(spec))
    expected = imaging.crop(picture, spec)
    assert tiling == expected.tiling
    assert np.array_equal(crops, expected.pixels)


@SPECS
def test_any_scale_from_the_words(spec):
    """Up, down, by fractions and by powers of two, on lines of every kind."""
    words = image_contract(spec)["resize"]
    rng = np.random.default_rng(1)
    for n, m in [(1, 7), (2, 3), (5, 1), (17, 378), (756, 378), (1134, 378), (377, 378), (3000, 11), (641, 640)]:
        line = rng.integers(0, 2, (n, 2, 3), np.uint8) * 255
        assert np.array_equal(resize_axis(line, m, words), imaging.resize(line, m, 2, spec.resample)), (n, m)


@SPECS
def test_tiling_from_the_words(spec):
    words = image_contract(spec)["tiling"]
    sides = [1, 2, 111, 112, 113, 250, 377, 378, 379, 500, 644, 645, 910, 911, 1500, 2999, 5000, 20000]
    for height in sides:
        for width in sides:
            assert tiling_rule(height, width, words) == imaging.tiling_of(height, width, spec), (height, width)


@SPECS
@pytest.mark.parametrize("tiling", [(1, 1), (1, 2), (3, 4), (1, 10), (5, 1)])
def test_stitching_from_the_words(spec, tiling):
    side = spec.size // spec.patch_size
    features = np.random.default_rng(0).standard_normal((tiling[0] * tiling[1], side * side, 5)).astype(np.float32)
    words = image_contract(spec)
    got = pool(stitch(features, tiling, words), words)
    expected = imaging.pool_local(features, spec, tiling)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() < 1e-6


@SPECS
def test_normalising_from_the_words(spec):
    words = image_contract(spec)["normalise"]
    pixels = pattern(20, 30)[None]
    mean, std = (np.array(words[key], np.float32) for key in ("mean", "std"))
    got = ((pixels.astype(np.float32) / np.float32(words["divide"])) - mean) / std
    assert words["layout"] == "n, 3, height, width"
    assert np.array_equal(np.moveaxis(got, 3, 1), imaging.normalise(pixels, spec))


def test_the_bundle_says_all_this(bundle):
    manifest = json.loads((bundle / MANIFEST).read_text())
    spec = manifest["model"]["image"]
    said = manifest["image"]
    assert (said["tiling"]["size"], said["resize"]["filter"]) == (spec["size"], spec["resample"])
    picture = pattern(*SIZE)
    vector = next(v for v in json.loads((bundle / "selftest.json").read_text())["pictures"] if v["width"] == SIZE[1])
    tiling, crops = cut(picture, said)
    assert list(tiling) == vector["tiling"]
    assert [sha(c) for c in crops] == vector["crops_sha256"]


SIZE = (472, 661)  # the larger picture of a self-test with crops of 378


def sha(array: np.ndarray) -> str:
    import hashlib

    return hashlib.sha256(array.tobytes()).hexdigest()


# ---- from the words -------------------------------------------------------------------------------------------------


def cut(picture: np.ndarray, words: dict[str, Any]) -> tuple[tuple[int, int], np.ndarray]:
    """`tiling`: the grid and all crops."""
    tiling = words["tiling"]
    size, window, margin = tiling["size"], tiling["window"], tiling["margin"]
    rows, columns = tiling_rule(picture.shape[0], picture.shape[1], tiling)
    canvas = resize(picture, rows * window + 2 * margin, columns * window + 2 * margin, words["resize"])
    crops = [resize(picture, size, size, words["resize"])]
    for row in range(rows):
        for column in range(columns):
            y, x = row * window, column * window
            crops.append(canvas[y : y + size, x : x + size])
    return (rows, columns), np.stack(crops)


def tiling_rule(height: int, width: int, words: dict[str, Any]) -> tuple[int, int]:
    """`tiling.rule`."""
    window, m = words["window"], words["max_crops"]
    h, w = height - 2 * words["margin"], width - 2 * words["margin"]
    if h <= window or w <= window:
        return 1, 1
    a, b = math.ceil(h / window), math.ceil(w / window)
    if a * b > m:
        r = math.sqrt(m / (a * b))
        return max(1, math.floor(a * r)), max(1, math.floor(b * r))
    rows, columns = max(math.floor(math.sqrt(m * h / w)), a), max(math.floor(math.sqrt(m * w / h)), b)
    if rows * columns > m:
        if columns > rows:
            columns = math.floor(m / rows)
        else:
            rows = math.floor(m / columns)
    return rows, columns


def resize(picture: np.ndarray, height: int, width: int, words: dict[str, Any]) -> np.ndarray:
    """`resize.order`, `resize.passes`."""
    for axis in words["order"]:
        if axis == "width":
            picture = resize_axis(picture.transpose(1, 0, 2), width, words).transpose(1, 0, 2)
        else:
            picture = resize_axis(picture, height, words)
    return np.ascontiguousarray(picture)


def resize_axis(picture: np.ndarray, m: int, words: dict[str, Any]) -> np.ndarray:
    """`resize.window`, `resize.weights`, `resize.sum` along the first axis."""
    n = picture.shape[0]
    if n == m:
        return picture
    scale = n / m
    stretch = max(scale, 1.0)
    out = np.empty((m, *picture.shape[1:]), np.uint8)
    for i in range(m):
        c = (i + 0.5) * scale
        first = max(int(c - words["support"] * stretch + 0.5), 0)
        last = min(int(c + words["support"] * stretch + 0.5), n)
        weights = [kernel((j - c + 0.5) * (1 / stretch), words["filter"]) for j in range(first, last)]
        total = sum(weights)
        fixed = [int(w / total * 2**22 + (-0.5 if w / total < 0 else 0.5)) for w in weights]
        values = picture[first:last].astype(np.int64)
        summed = 2**21 + np.tensordot(np.array(fixed, np.int64), values, axes=(0, 0))
        out[i] = np.clip(summed >> 22, 0, 255)
    return out


def kernel(x: float, name: str) -> float:
    """`resize.kernel`."""
    if name == "lanczos":
        return sinc(x) * sinc(x / 3) if -3 <= x < 3 else 0.0
    a, x = -0.5, abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


def sinc(x: float) -> float:
    """`resize.kernel`."""
    return math.sin(math.pi * x) / (math.pi * x) if x != 0 else 1.0


def stitch(features: np.ndarray, tiling: tuple[int, int], words: dict[str, Any]) -> np.ndarray:
    """`stitching.grid`, `stitching.place`, `stitching.rule`: [rows, columns, width] in patches."""
    patch, margin = words["tiling"]["patch_size"], words["tiling"]["margin_patches"]
    inner, side = words["tiling"]["window"] // patch, words["tiling"]["size"] // patch
    rows, columns = tiling
    grid = np.full((rows * inner + 2 * margin, columns * inner + 2 * margin, features.shape[2]), np.nan, np.float32)
    for row in range(rows):
        for column in range(columns):
            crop = features[row * columns + column].reshape(side, side, -1)
            top, bottom = 0 if row == 0 else margin, side if row == rows - 1 else side - margin
            left, right = 0 if column == 0 else margin, side if column == columns - 1 else side - margin
            y, x = row * inner, column * inner
            grid[y + top : y + bottom, x + left : x + right] = crop[top:bottom, left:right]
    assert not np.isnan(grid).any()
    return grid


def pool(grid: np.ndarray, words: dict[str, Any]) -> np.ndarray:
    """`stitching.pooling`: [patches of one crop, width]."""
    g = words["tiling"]["size"] // words["tiling"]["patch_size"]
    spans = [[((i * n) // g, math.ceil((i + 1) * n / g)) for i in range(g)] for n in grid.shape[:2]]
    rows = [[grid[y0:y1, x0:x1].mean(axis=(0, 1)) for x0, x1 in spans[1]] for y0, y1 in spans[0]]
    return np.array(rows).reshape(g * g, -1)
