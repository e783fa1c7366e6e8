"""From any picture to the crops that a model sees, and from crop features back to one grid. numpy and Pillow only.

Resizing is two one-axis Pillow calls, width first: the same bytes under every Pillow (13.0 reordered the passes
of a single call). Pillow resizes each axis in 22-bit fixed point and rounds to 8 bits after each pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image as Pillow

from vlmedge.session import F32, U8, Grid
from vlmedge.spec import ImageSpec

_FILTERS = {"lanczos": Pillow.Resampling.LANCZOS, "bicubic": Pillow.Resampling.BICUBIC}


@dataclass(frozen=True, slots=True)
class Crops:
    """What the vision tower is shown: uint8 [n, size, size, 3] and the grid (rows, columns) of the local crops.

    Crop 0 is the whole picture; the local crops follow row by row.
    """

    pixels: U8
    tiling: Grid

    @property
    def count(self) -> int:
        """Crops, the global one included."""
        return int(self.pixels.shape[0])


def resize(picture: U8, height: int, width: int, resample: str) -> U8:
    """Resize RGB uint8 [h, w, 3] to [height, width, 3], columns before rows."""
    image = Pillow.fromarray(picture)
    if image.width != width:
        image = image.resize((width, image.height), _FILTERS[resample])
    if image.height != height:
        image = image.resize((width, height), _FILTERS[resample])
    return np.asarray(image)


def select_tiling(height: int, width: int, window: int, most: int) -> Grid:
    """Choose rows and columns of local crops for a picture whose size (margins subtracted) is height x width.

    The rule of vikhyat/moondream `image_crops.select_tiling`; an elongated picture may exceed `most`.
    """
    if height <= window or width <= window:
        return 1, 1
    least_rows, least_columns = math.ceil(height / window), math.ceil(width / window)
    if least_rows * least_columns > most:
        ratio = math.sqrt(most / (least_rows * least_columns))
        return max(1, math.floor(least_rows * ratio)), max(1, math.floor(least_columns * ratio))
    rows = max(math.floor(math.sqrt(most * height / width)), least_rows)
    columns = max(math.floor(math.sqrt(most * width / height)), least_columns)
    if rows * columns > most:
        if columns > rows:
            columns = math.floor(most / rows)
        else:
            rows = math.floor(most / columns)
    return max(1, rows), max(1, columns)


def tiling_of(height: int, width: int, spec: ImageSpec) -> Grid:
    """Rows and columns of local crops for a picture of height x width pixels."""
    margin, window = _margin_and_window(spec)
    return select_tiling(height - 2 * margin, width - 2 * margin, window, spec.tiling.max_crops)


def crop(picture: U8, spec: ImageSpec) -> Crops:
    """Cut an RGB picture uint8 [h, w, 3] into one global and rows x columns overlapping local crops."""
    margin, window = _margin_and_window(spec)
    rows, columns = tiling_of(picture.shape[0], picture.shape[1], spec)
    whole = resize(picture, spec.size, spec.size, spec.resample)
    if (rows, columns) == (1, 1):
        return Crops(np.stack([whole, whole]), (1, 1))
    canvas = resize(picture, rows * window + 2 * margin, columns * window + 2 * margin, spec.resample)
    local = [
        canvas[row * window : row * window + spec.size, column * window : column * window + spec.size]
        for row in range(rows)
        for column in range(columns)
    ]
    return Crops(np.stack([whole, *local]), (rows, columns))


def normalise(pixels: U8, spec: ImageSpec) -> F32:
    """uint8 [n, h, w, 3] -> float32 [n, 3, h, w]: (pixel / 255 - mean) / std, each step rounded to float32."""
    mean, std = (np.array(values, np.float32) for values in (spec.mean, spec.std))
    scaled = (pixels.astype(np.float32) / np.float32(255.0) - mean) / std
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


@lru_cache(maxsize=64)
def stitch_index(spec: ImageSpec, tiling: Grid) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Which feature row lands where: int64 [rows, columns] of the stitched grid.

    Entries index the local crops' features flattened to [local crops * tokens]. Every crop gives its inner
    window, and its margin too where it lies on the picture's border.
    """
    side, margin = spec.size // spec.patch_size, spec.tiling.margin
    window = side - 2 * margin
    rows, columns = tiling
    y, x = np.arange(rows * window + 2 * margin), np.arange(columns * window + 2 * margin)
    tile_y = np.clip((y - margin) // window, 0, rows - 1)
    tile_x = np.clip((x - margin) // window, 0, columns - 1)
    inner = (y - tile_y * window)[:, None] * side + (x - tile_x * window)[None, :]
    index: np.ndarray[tuple[int, int], np.dtype[np.int64]] = (
        tile_y[:, None] * columns + tile_x[None, :]
    ) * side * side + inner
    return index


@lru_cache(maxsize=64)
def pool_matrix(source: int, target: int) -> F32:
    """Adaptive average pooling of one axis as a matrix float32 [target, source]; windows overlap where needed."""
    matrix = np.zeros((target, source), np.float32)
    for i in range(target):
        start, stop = (i * source) // target, -((-(i + 1) * source) // target)
        matrix[i, start:stop] = 1.0 / (stop - start)
    return matrix


def pool_local(features: F32, spec: ImageSpec, tiling: Grid) -> F32:
    """Stitch the local crops' features [n, tokens, width] and pool them to one crop's grid: [tokens, width]."""
    index = stitch_index(spec, tiling)
    side = spec.size // spec.patch_size
    grid = features.reshape(-1, features.shape[-1])[index]
    if grid.shape[:2] == (side, side):
        return grid.reshape(side * side, -1)
    down = np.tensordot(pool_matrix(grid.shape[0], side), grid, axes=(1, 0))
    across = np.tensordot(pool_matrix(grid.shape[1], side), down, axes=(1, 1))
    return np.ascontiguousarray(across.transpose(1, 0, 2)).reshape(side * side, -1)


def _margin_and_window(spec: ImageSpec) -> tuple[int, int]:
    margin = spec.patch_size * spec.tiling.margin
    return margin, spec.size - 2 * margin
