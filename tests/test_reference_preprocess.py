"""Preprocessing's second implementation gives the first one's bytes and upstream's; differences get a name."""

import hashlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmedge import imaging
from vlmedge.parity.pictures import features
from vlmedge.parity.preprocess import PreprocessResult, difference
from vlmedge.reference import preprocess
from vlmedge.spec import ImageSpec, OverlapCrops

DATA = Path(__file__).parent / "data/moondream2/preprocess"
SPEC = ImageSpec(378, 14, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "lanczos", OverlapCrops(12, 4))
SMALL = ImageSpec(28, 7, (0.5, 0.4, 0.3), (0.5, 0.25, 0.125), "bicubic", OverlapCrops(6, 1))
BOTH = pytest.mark.parametrize(
    "spec", [SPEC, replace(SPEC, resample="bicubic"), SMALL], ids=["lanczos", "bicubic", "s"]
)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)


def assert_same(picture: np.ndarray, spec: ImageSpec) -> None:
    tiling, pixels = preprocess.crops(picture, spec)
    expected = imaging.crop(picture, spec)
    assert tiling == expected.tiling
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, expected.pixels)


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 300), width=st.integers(1, 300), lanczos=st.booleans(), hard=st.booleans())
def test_any_size_gives_the_same_bytes(height, width, lanczos, hard):
    picture = noise(height, width)
    if hard:  # edges from 0 to 255: sums fall below 0 and above 255
        picture = (picture > 127).astype(np.uint8) * np.uint8(255)
    assert_same(picture, replace(SMALL, resample="lanczos") if lanczos else SMALL)


@BOTH
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (379, 30), (400, 5000), (378, 378), (379, 379), (700, 500)])
def test_odd_sizes_give_the_same_bytes(spec, size):
    assert_same(noise(*size), spec)


def test_a_photographs_size_gives_the_same_bytes():
    assert_same(noise(3000, 4000), SPEC)


def test_tilings_are_upstreams():
    for size, tiling in json.loads((DATA / "tilings_hxw.json").read_text()).items():
        height, width = map(int, size.split("x"))
        margin = SPEC.patch_size * SPEC.tiling.margin
        window = SPEC.size - 2 * margin
        assert preprocess.tiling_rule(height - 2 * margin, width - 2 * margin, window, 12) == tuple(tiling), size


@pytest.mark.parametrize("name", ["300x200", "378x900", "500x1400", "600x800"])
def test_crops_are_upstreams(name):
    known = json.loads((DATA / "crops_pil.json").read_text())["images"][name]
    picture = np.array(Image.open(DATA / f"images/pre_{name}.png").convert("RGB"))
    tiling, pixels = preprocess.crops(picture, SPEC)
    assert tiling == tuple(known["tiling"])
    assert [hashlib.sha256(c.tobytes()).hexdigest() for c in pixels] == known["crops_sha256"]


def test_stitching_and_pooling_are_upstreams():
    """Features that are their own index come out as upstream's index, pooled by upstream's windows."""
    windows = json.loads((DATA / "pool_windows.json").read_text())
    side = SPEC.size // SPEC.patch_size
    known = np.load(DATA / "stitch_index.npz")
    for name in known.files:
        rows, columns = map(int, name.split("x"))
        index = np.arange(rows * columns * side * side, dtype=np.float32).reshape(rows * columns, -1, 1)
        grid = preprocess.stitch(index, (rows, columns), side - 2 * SPEC.tiling.margin, SPEC.tiling.margin)
        assert np.array_equal(grid[..., 0], known[name]), name
    for cells, spans in windows.items():
        line = np.random.default_rng(0).standard_normal((int(cells), side, 1)).astype(np.float32)
        expected = np.stack([line[start:stop].mean(axis=0) for start, stop in spans])
        assert preprocess.pool(line, side).ravel() == pytest.approx(expected.ravel(), abs=1e-6)


@BOTH
@pytest.mark.parametrize("tiling", [(1, 1), (2, 3), (1, 10), (15, 1)])
def test_local_features_are_joined_alike(spec, tiling):
    local = features(tiling[0] * tiling[1], (spec.size // spec.patch_size) ** 2, 5)
    got, expected = preprocess.joined(local, spec, tiling), imaging.pool_local(local, spec, tiling)
    assert (got.shape, got.dtype) == (expected.shape, np.float32)
    assert np.abs(got - expected).max() < 2e-6


@BOTH
def test_normalising_is_the_same(spec):
    pixels = noise(20, 30)[None]
    got = preprocess.normalise(pixels, spec)
    assert got.dtype == np.float32
    assert np.array_equal(got, imaging.normalise(pixels, spec))


def test_it_stands_alone():
    """What it is compared with, and what the reference needs besides, is not even loaded."""
    script = (
        "import sys, vlmedge.reference.preprocess;"
        "print(*sorted({'vlmedge.imaging', 'PIL', 'torch'} & {*sys.modules}), end='')"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout == b""


def found(change=lambda pixels: pixels, spec: ImageSpec = SMALL, tiling=None) -> PreprocessResult:
    """The difference after `change` of a runtime's crops, of a picture that is cut into 2 x 3."""
    picture = noise(60, 90)
    crops = imaging.crop(picture, spec)
    assert crops.tiling == (2, 3)
    return difference(picture, tiling or crops.tiling, change(crops.pixels), SMALL)


def test_equal_crops_do_not_differ():
    assert found() == PreprocessResult(0, 0.0, None, "")


def test_a_changed_crop_is_named():
    def change(pixels: np.ndarray) -> np.ndarray:
        pixels = pixels.astype(np.int16)
        pixels[3] += np.where(pixels[3] < 128, 12, -12).astype(np.int16)
        pixels[5, 0, 0, 0] += -40 if pixels[5, 0, 0, 0] > 128 else 40
        return pixels.astype(np.uint8)

    result = found(change)
    assert (result.max_abs, result.crop, result.why) == (40, 3, "crop 3 of 7 differs by up to 12 of 255")
    pixels = imaging.crop(noise(60, 90), SMALL).pixels.astype(np.float64)
    norm = math.sqrt(12**2 * pixels[3].size + 40**2)
    assert result.relative_rms == pytest.approx(norm / np.linalg.norm(pixels))


def test_another_filter_differs_from_the_first_crop_on():
    result = found(spec=replace(SMALL, resample="lanczos"))
    assert result.crop == 0
    assert 0 < result.relative_rms < 0.5
    assert result.why.startswith("crop 0 of 7 differs by up to ")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda p: p[..., ::-1], "channels are in the order BGR"),
        (lambda p: p[[0, 1, 4, 2, 5, 3, 6]], "crops are in column order"),
    ],
)
def test_another_order_is_recognised(change, why):
    result = found(change)
    assert result.why == why
    assert result.max_abs > 0
    assert 0 < result.relative_rms < math.inf
    assert result.crop == (0 if "BGR" in why else 2)


@pytest.mark.parametrize(
    ("change", "tiling", "why"),
    [
        (lambda p: p, (3, 2), "tiling 3 x 2 instead of 2 x 3"),
        (lambda p: p[1:], (2, 3), "6 crops instead of 7"),
        (lambda p: p[:, :27], (2, 3), "crops of 27 x 28 x 3 instead of 28 x 28 x 3"),
    ],
)
def test_another_shape_is_all_the_difference_there_is(change, tiling, why):
    assert found(change, tiling=tiling) == PreprocessResult(255, math.inf, None, why)


def test_a_single_crop_is_two():
    picture = noise(20, 20)
    result = difference(picture, (1, 1), imaging.crop(picture, SMALL).pixels[:1], SMALL)
    assert result.why == "1 crop instead of 2"
