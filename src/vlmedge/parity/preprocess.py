"""A runtime's crops against those of the second implementation of preprocessing: where do they part, and how?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from vlmedge.reference import preprocess
from vlmedge.session import U8, Grid
from vlmedge.spec import ImageSpec

_MOST = 255


@dataclass(frozen=True, slots=True)
class PreprocessResult:
    """How far crops are from the reference's.

    `max_abs`: the largest difference of a byte, 255 where the shape or the tiling differs. `relative_rms`: norm of the
    difference over the norm of the reference, infinite there. `crop`: the first crop that differs, counted from 0 (the
    whole picture) as the contract counts; None where none differs or none could be compared. `why`: one line, empty
    where all bytes are equal.
    """

    max_abs: int
    relative_rms: float
    crop: int | None
    why: str


def difference(picture: U8, tiling: Grid, pixels: U8, spec: ImageSpec) -> PreprocessResult:
    """Compare a runtime's `tiling` and crops (uint8 [n, size, size, 3]) of an RGB picture uint8 [h, w, 3]."""
    grid, expected = preprocess.crops(picture, spec)
    why = _another_shape(tiling, pixels.shape, grid, expected.shape)
    if why:
        return PreprocessResult(_MOST, math.inf, None, why)
    delta = np.abs(pixels.astype(np.int16) - expected)
    most = delta.max(axis=(1, 2, 3))
    if not most.any():
        return PreprocessResult(0, 0.0, None, "")
    scale = float(np.linalg.norm(expected.astype(np.float64))) or 1.0
    rms = float(np.linalg.norm(delta.astype(np.float64))) / scale
    first = int((most > 0).argmax())
    why = _another_order(pixels, expected, grid)
    why = why or f"crop {first} of {len(expected)} differs by up to {most[first]} of {_MOST}"
    return PreprocessResult(int(most.max()), rms, first, why)


def _another_shape(tiling: Grid, shape: tuple[int, ...], grid: Grid, expected: tuple[int, ...]) -> str:
    """One line where no byte can be compared, else nothing."""
    if tuple(tiling) != grid:
        return f"tiling {_by(tiling)} instead of {_by(grid)}"
    if shape[1:] != expected[1:]:
        return f"crops of {_by(shape[1:])} instead of {_by(expected[1:])}"
    if shape[0] != expected[0]:
        return f"{shape[0]} crop{'' if shape[0] == 1 else 's'} instead of {expected[0]}"
    return ""


def _another_order(pixels: U8, expected: U8, grid: Grid) -> str:
    """One line where the bytes are right and only their order is not, else nothing."""
    if np.array_equal(pixels[..., ::-1], expected):
        return "channels are in the order BGR"
    columns_first = np.arange(1, len(expected)).reshape(grid).T.ravel()
    if np.array_equal(pixels, expected[[0, *columns_first]]):
        return "crops are in column order"
    return ""


def _by(sides: tuple[int, ...]) -> str:
    return " x ".join(map(str, sides))
