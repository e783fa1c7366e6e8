"""The manifest's words about pictures are enough: a second implementation made from them alone gives the same bytes.

Everything below `# ---- from the words` takes its numbers from `manifest["image"]`. The sentences are followed once, by
the steps of `vlmedge.reference.preprocess`, which are given these numbers here: no ImageSpec, no Pillow and no
`vlmedge.imaging` say what to do.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from skimage import data

from vlmedge import imaging
from vlmedge.bundle import MANIFEST
from vlmedge.contract import image_contract
from vlmedge.parity.pictures import pattern
from vlmedge.reference.preprocess import KERNELS, pool, resize_axis, stitch, tiling_rule
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
        assert np.array_equal(along(line, m, words), imaging.resize(line, m, 2, spec.resample)), (n, m)


@SPECS
def test_tiling_from_the_words(spec):
    words = image_contract(spec)["tiling"]
    sides = [1, 2, 111, 112, 113, 250, 377, 378, 379, 500, 644, 645, 910, 911, 1500, 2999, 5000, 20000]
    for height in sides:
        for width in sides:
            assert tiled(height, width, words) == imaging.tiling_of(height, width, spec), (height, width)


@SPECS
@pytest.mark.parametrize("tiling", [(1, 1), (1, 2), (3, 4), (1, 10), (5, 1)])
def test_stitching_from_the_words(spec, tiling):
    side = spec.size // spec.patch_size
    features = np.random.default_rng(0).standard_normal((tiling[0] * tiling[1], side * side, 5)).astype(np.float32)
    words = image_contract(spec)
    got = joined(features, tiling, words)
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
    rows, columns = tiled(picture.shape[0], picture.shape[1], tiling)
    canvas = resize(picture, rows * window + 2 * margin, columns * window + 2 * margin, words["resize"])
    crops = [resize(picture, size, size, words["resize"])]
    for row in range(rows):
        for column in range(columns):
            y, x = row * window, column * window
            crops.append(canvas[y : y + size, x : x + size])
    return (rows, columns), np.stack(crops)


def tiled(height: int, width: int, words: dict[str, Any]) -> tuple[int, int]:
    """`tiling.rule`."""
    h, w = height - 2 * words["margin"], width - 2 * words["margin"]
    return tiling_rule(h, w, words["window"], words["max_crops"])


def resize(picture: np.ndarray, height: int, width: int, words: dict[str, Any]) -> np.ndarray:
    """`resize.order`, `resize.passes`."""
    for axis in words["order"]:
        if axis == "width":
            picture = along(picture.transpose(1, 0, 2), width, words).transpose(1, 0, 2)
        else:
            picture = along(picture, height, words)
    return np.ascontiguousarray(picture)


def along(picture: np.ndarray, m: int, words: dict[str, Any]) -> np.ndarray:
    """`resize.kernel` and `resize.support`, along the first axis."""
    return resize_axis(picture, m, KERNELS[words["filter"]], words["support"])


def joined(features: np.ndarray, tiling: tuple[int, int], words: dict[str, Any]) -> np.ndarray:
    """`stitching`: [patches of one crop, width]."""
    patch, margin = words["tiling"]["patch_size"], words["tiling"]["margin_patches"]
    grid = stitch(features, tiling, words["tiling"]["window"] // patch, margin)
    assert not np.isnan(grid).any()
    return pool(grid, words["tiling"]["size"] // patch)
