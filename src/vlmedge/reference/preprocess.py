"""Preprocessing a second time, from the words of `contract` alone: numpy and integers, no Pillow and no `imaging`.

A sum of weight * value is an integer below 2^53, so that a float64 matrix product gives it exactly, in any order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from vlmedge.session import F32, U8, Grid
from vlmedge.spec import ImageSpec

Kernel: TypeAlias = Callable[[float], float]

_FRACTION_BITS = 22
_OUTPUTS = 16  # neighbouring outputs computed at once: their windows overlap, so one block of inputs serves all
_VALUES = 1 << 19  # inputs held as float64 at once: 4 MiB


def lanczos(x: float) -> float:
    """`resize.kernel` of the filter "lanczos"; its support is 3."""
    return _sinc(x) * _sinc(x / 3) if -3 <= x < 3 else 0.0


def bicubic(x: float) -> float:
    """`resize.kernel` of the filter "bicubic"; its support is 2."""
    a, x = -0.5, abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


KERNELS: Final[dict[str, Kernel]] = {"lanczos": lanczos, "bicubic": bicubic}
_SUPPORT = {"lanczos": 3.0, "bicubic": 2.0}


def crops(picture: U8, spec: ImageSpec) -> tuple[Grid, U8]:
    """RGB uint8 [h, w, 3] -> rows and columns of the local crops, and all crops uint8 [n, size, size, 3].

    Crop 0 is the whole picture, the local ones follow row by row; for (1, 1) both are the same.
    """
    margin = spec.patch_size * spec.tiling.margin
    window, size = spec.size - 2 * margin, spec.size
    rows, columns = tiling(picture.shape[0], picture.shape[1], spec)
    out = np.empty((1 + rows * columns, size, size, 3), np.uint8)
    out[0] = _resize(picture, size, size, spec.resample)
    canvas = _resize(picture, rows * window + 2 * margin, columns * window + 2 * margin, spec.resample)
    for i in range(rows * columns):
        y, x = i // columns * window, i % columns * window
        out[1 + i] = canvas[y : y + size, x : x + size]
    return (rows, columns), out


def tiling(height: int, width: int, spec: ImageSpec) -> Grid:
    """Rows and columns of local crops for a picture of height x width pixels."""
    margin = spec.patch_size * spec.tiling.margin
    return tiling_rule(height - 2 * margin, width - 2 * margin, spec.size - 2 * margin, spec.tiling.max_crops)


def normalise(pixels: U8, spec: ImageSpec) -> F32:
    """uint8 [n, h, w, 3] -> float32 [n, 3, h, w]: (pixel / 255 - mean) / std, each step rounded to float32."""
    out = np.empty((pixels.shape[0], 3, *pixels.shape[1:3]), np.float32)
    for channel, (mean, std) in enumerate(zip(spec.mean, spec.std, strict=True)):
        share = pixels[..., channel].astype(np.float32) / np.float32(255)
        out[:, channel] = (share - np.float32(mean)) / np.float32(std)
    return out


def joined(features: F32, spec: ImageSpec, tiling: Grid) -> F32:
    """Local crops' features [rows * columns, tokens, width] -> stitched and pooled to one crop's [tokens, width]."""
    side = spec.size // spec.patch_size
    return pool(stitch(features, tiling, side - 2 * spec.tiling.margin, spec.tiling.margin), side)


def tiling_rule(h: int, w: int, window: int, m: int) -> Grid:
    """`tiling.rule`: rows and columns for a picture of h x w pixels, margins subtracted."""
    if h <= window or w <= window:
        return 1, 1
    a, b = math.ceil(h / window), math.ceil(w / window)
    if a * b > m:
        r = math.sqrt(m / (a * b))
        return max(1, math.floor(a * r)), max(1, math.floor(b * r))
    rows, columns = max(math.floor(math.sqrt(m * h / w)), a), max(math.floor(math.sqrt(m * w / h)), b)
    if rows * columns <= m:
        return rows, columns
    return (rows, math.floor(m / rows)) if columns > rows else (math.floor(m / columns), columns)


def resize_axis(picture: U8, m: int, kernel: Kernel, support: float) -> U8:
    """Resize the first axis of uint8 [n, ...] to m: `resize.window`, `resize.weights`, `resize.sum`."""
    n = picture.shape[0]
    if n == m:
        return picture
    lines = np.ascontiguousarray(picture).reshape(n, -1)
    out = np.empty((m, lines.shape[1]), np.uint8)
    for start in range(0, m, _OUTPUTS):
        outputs = range(start, min(start + _OUTPUTS, m))
        first, weights = _matrix([_window(i, n, m, kernel, support) for i in outputs])
        step = max(1, _VALUES // weights.shape[1])
        for at in range(0, lines.shape[1], step):
            values = lines[first : first + weights.shape[1], at : at + step].astype(np.float64)
            summed = (weights @ values).astype(np.int64) + (1 << _FRACTION_BITS - 1)
            out[start : outputs.stop, at : at + step] = (summed >> _FRACTION_BITS).clip(0, 255)
    return out.reshape(m, *picture.shape[1:])


def stitch(features: F32, tiling: Grid, inner: int, margin: int) -> F32:
    """`stitching.grid`, `.place`, `.rule`: [crops, tokens, width] -> [rows, columns, width], in patches.

    `inner`: patches of a crop's side without its margins. A patch that no crop gives would be NaN.
    """
    (rows, columns), side = tiling, inner + 2 * margin
    grid = np.full((rows * inner + 2 * margin, columns * inner + 2 * margin, features.shape[2]), np.nan, np.float32)
    for row in range(rows):
        for column in range(columns):
            crop = features[row * columns + column].reshape(side, side, -1)
            top, bottom = 0 if row == 0 else margin, side if row == rows - 1 else side - margin
            left, right = 0 if column == 0 else margin, side if column == columns - 1 else side - margin
            y, x = row * inner, column * inner
            grid[y + top : y + bottom, x + left : x + right] = crop[top:bottom, left:right]
    return grid


def pool(grid: F32, g: int) -> F32:
    """`stitching.pooling`: float32 [rows, columns, width] -> [g * g, width]."""
    down, across = ([((i * n) // g, math.ceil((i + 1) * n / g)) for i in range(g)] for n in grid.shape[:2])
    out = np.empty((g * g, grid.shape[2]), np.float32)
    for i in range(g * g):
        (top, bottom), (left, right) = down[i // g], across[i % g]
        out[i] = grid[top:bottom, left:right].mean(axis=(0, 1))
    return out


def _resize(picture: U8, height: int, width: int, resample: str) -> U8:
    """`resize.order`: width first."""
    kernel, support = KERNELS[resample], _SUPPORT[resample]
    wide = resize_axis(picture.transpose(1, 0, 2), width, kernel, support).transpose(1, 0, 2)
    return resize_axis(wide, height, kernel, support)


def _window(i: int, n: int, m: int, kernel: Kernel, support: float) -> tuple[int, list[int]]:
    """The first input of output i, and the weights from there on, times 2^22."""
    scale = n / m
    stretch = max(scale, 1.0)
    c = (i + 0.5) * scale
    first, last = max(int(c - support * stretch + 0.5), 0), min(int(c + support * stretch + 0.5), n)
    weights = [kernel((j - c + 0.5) * (1 / stretch)) for j in range(first, last)]
    total = 0.0
    for weight in weights:  # one after the other: `sum` compensates for rounding from Python 3.12 on
        total += weight
    return first, [int(w / total * (1 << _FRACTION_BITS) + math.copysign(0.5, w / total)) for w in weights]


def _matrix(windows: list[tuple[int, list[int]]]) -> tuple[int, npt.NDArray[np.float64]]:
    """Windows of neighbouring outputs as rows over all inputs that they see, and the first of these inputs."""
    first, last = windows[0][0], max(start + len(weights) for start, weights in windows)
    matrix = np.zeros((len(windows), last - first))
    for row, (start, weights) in zip(matrix, windows, strict=True):
        row[start - first : start - first + len(weights)] = weights
    return first, matrix


def _sinc(x: float) -> float:
    return math.sin(math.pi * x) / (math.pi * x) if x != 0 else 1.0
