"""Crops bit for bit as upstream's Pillow path makes them, stitching and pooling as upstream's torch code."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmedge import imaging
from vlmedge.parity.pictures import pattern
from vlmedge.spec import ImageSpec, OverlapCrops

DATA = Path(__file__).parent / "data/moondream2/preprocess"
SPEC = ImageSpec(378, 14, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "lanczos", OverlapCrops(12, 4))
SMALL = ImageSpec(112, 14, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "lanczos", OverlapCrops(6, 1))


def test_tilings_are_upstreams():
    known = json.loads((DATA / "tilings_hxw.json").read_text())
    assert len(known) == 495
    for size, tiling in known.items():
        height, width = map(int, size.split("x"))
        assert imaging.tiling_of(height, width, SPEC) == tuple(tiling), size


@pytest.mark.parametrize("name", ["300x200", "378x900", "500x1400", "600x800"])
def test_crops_are_upstreams(name):
    known = json.loads((DATA / "crops_pil.json").read_text())["images"][name]
    crops = imaging.crop(np.array(Image.open(DATA / f"images/pre_{name}.png").convert("RGB")), SPEC)
    assert crops.tiling == tuple(known["tiling"])
    assert [hashlib.sha256(c.tobytes()).hexdigest() for c in crops.pixels] == known["crops_sha256"]


def test_stitching_is_upstreams():
    known = np.load(DATA / "stitch_index.npz")
    for name in known.files:
        rows, columns = map(int, name.split("x"))
        assert np.array_equal(imaging.stitch_index(SPEC, (rows, columns)), known[name]), name


def test_pooling_is_upstreams():
    for cells, windows in json.loads((DATA / "pool_windows.json").read_text()).items():
        matrix = imaging.pool_matrix(int(cells), 27)
        for row, (start, stop) in zip(matrix, windows, strict=True):
            expected = np.zeros(int(cells), np.float32)
            expected[start:stop] = 1 / (stop - start)
            assert np.array_equal(row, expected)


@pytest.mark.parametrize(
    ("height", "width", "tiling"),
    [
        (1, 1, (1, 1)),
        (1, 5000, (1, 1)),
        (378, 5000, (1, 1)),
        (379, 379, (3, 3)),
        (400, 5000, (1, 10)),
        (10000, 380, (15, 1)),  # more than 12 crops: an elongated picture exceeds max_crops, as upstream's does
        (379, 30000, (1, 26)),
    ],
)
def test_any_size(height, width, tiling):
    crops = imaging.crop(pattern(height, width), SPEC)
    assert crops.tiling == tiling
    assert crops.pixels.shape == (1 + tiling[0] * tiling[1], 378, 378, 3)


def test_single_crop_is_the_global_one():
    crops = imaging.crop(pattern(200, 300), SPEC)
    assert np.array_equal(crops.pixels[0], crops.pixels[1])


def test_resizing_goes_width_first():
    """Two one-axis calls, so that Pillow 13's other order of passes in one call changes nothing."""
    picture = pattern(301, 463)
    wide = Image.fromarray(picture).resize((140, 301), Image.Resampling.LANCZOS)
    both = np.asarray(wide.resize((140, 98), Image.Resampling.LANCZOS))
    assert np.array_equal(imaging.resize(picture, 98, 140, "lanczos"), both)
    assert imaging.resize(picture, 301, 463, "lanczos") is not picture
    assert np.array_equal(imaging.resize(picture, 301, 463, "lanczos"), picture)


def test_normalise():
    pixels = np.array([0, 127, 255], np.uint8).reshape(1, 1, 1, 3)
    assert imaging.normalise(pixels, SPEC).shape == (1, 3, 1, 1)
    assert imaging.normalise(pixels, SPEC).ravel() == pytest.approx([-1, -0.00392157, 1], abs=1e-6)


@pytest.mark.parametrize("tiling", [(1, 1), (2, 3), (1, 6)])
def test_local_crops_come_back_in_place(tiling):
    """Features that hold their own position in the canvas are stitched into an ascending grid, at any crop size."""
    window, side, margin = 6, 8, 1
    rows, columns = tiling
    grid = np.stack(np.meshgrid(np.arange(rows * window + 2), np.arange(columns * window + 2), indexing="ij"), -1)
    local = [
        grid[r * window : r * window + side, c * window : c * window + side]
        for r in range(rows)
        for c in range(columns)
    ]
    features = np.stack(local).reshape(rows * columns, side * side, 2).astype(np.float32)
    stitched = features.reshape(-1, 2)[imaging.stitch_index(SMALL, tiling)]
    assert margin == SMALL.tiling.margin
    assert np.array_equal(stitched, grid.astype(np.float32))
    pooled = imaging.pool_local(features, SMALL, tiling)
    assert pooled.shape == (64, 2)
    assert pooled[0, 0] < pooled[-1, 0]
