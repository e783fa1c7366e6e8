"""Pictures made from a formula, so that any language can make the same pixels without decoding a file."""

from __future__ import annotations

import numpy as np

from vlmedge.session import U8
from vlmedge.spec import ImageSpec

FORMULA = (
    "value(y, x, c) = ((3 * x * x + 5 * y * y + 7 * x * y) >> 6) + 85 * c + 64 * ((x >> 4 ^ y >> 4) & 1), "
    "as unsigned integers, modulo 256"
)


def pattern(height: int, width: int) -> U8:
    """The picture of `FORMULA`: RGB uint8 [height, width, 3], gradients of all frequencies and hard edges."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    base = ((3 * x * x + 5 * y * y + 7 * x * y) >> 6) + 64 * (((x >> 4) ^ (y >> 4)) & 1)
    picture: U8 = ((base[:, :, None] + 85 * np.arange(3)) % 256).astype(np.uint8)
    return picture


def sizes(spec: ImageSpec) -> tuple[tuple[int, int], ...]:
    """Heights and widths of the test pictures: one that is a single crop, one that is cut into several."""
    return (spec.size * 3 // 4, spec.size // 2), (spec.size * 5 // 4, spec.size * 7 // 4)
