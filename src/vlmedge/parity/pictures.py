"""Inputs made from formulas, so that any language can make the same numbers without decoding a file."""

from __future__ import annotations

import numpy as np

from vlmedge.session import F32, U8
from vlmedge.spec import ImageSpec

PIXELS = (
    "value(y, x, c) = ((3 * x * x + 5 * y * y + 7 * x * y) >> 6) + 85 * c + 64 * ((x >> 4 ^ y >> 4) & 1), "
    "as unsigned integers, modulo 256"
)
FEATURES = (
    "value(i) = ((i * 2654435761 mod 2^32) >> 8) / 2^23 * 1.7 - 1.7 for the i-th element in row-major order, float32"
)


def pattern(height: int, width: int) -> U8:
    """The picture of `PIXELS`: RGB uint8 [height, width, 3], gradients of all frequencies and hard edges."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    base = ((3 * x * x + 5 * y * y + 7 * x * y) >> 6) + 64 * (((x >> 4) ^ (y >> 4)) & 1)
    picture: U8 = ((base[:, :, None] + 85 * np.arange(3)) % 256).astype(np.uint8)
    return picture


def features(crops: int, tokens: int, width: int) -> F32:
    """The numbers of `FEATURES`: float32 [crops, tokens, width], evenly spread, RMS 1 as a normed tower's are."""
    out = np.empty((crops, tokens, width), np.float32)
    for crop, values in enumerate(out):  # crop by crop: the integers are twice as wide as what comes of them
        index = np.arange(crop * tokens * width, (crop + 1) * tokens * width, dtype=np.uint64)
        hashed = ((index * 2654435761) & 0xFFFFFFFF) >> 8
        values[:] = (hashed.astype(np.float64) / (1 << 23) * 1.7 - 1.7).reshape(tokens, width)
    return out


def region_inputs(width: int) -> dict[str, F32]:
    """What each region head is given: coordinates and sizes in 0..1, and the first numbers of `FEATURES` as hidden."""
    hidden = features(1, 1, width)[0, 0]
    coordinate, size = np.array([0.3], np.float32), np.array([0.25, 0.5], np.float32)
    return {"coord_encoder": coordinate, "size_encoder": size, "coord_decoder": hidden, "size_decoder": hidden}


def sizes(spec: ImageSpec) -> tuple[tuple[int, int], tuple[int, int]]:
    """Heights and widths of the test pictures: one that is a single crop, one that is cut into several."""
    return (spec.size * 3 // 4, spec.size // 2), (spec.size * 5 // 4, spec.size * 7 // 4)
