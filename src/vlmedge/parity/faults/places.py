"""Words for a part of a stored matrix, in no format's words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from vlmedge.spec import Shape

Array: TypeAlias = npt.NDArray[Any]

# scales and zeros: [rows, groups], canonical rows; zeros in units of a code. codes: packed bytes. bytes: all of the
# main array's bytes, of any type.
Part = Literal["scales", "zeros", "codes", "bytes"]
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Place:
    """A part of a canonical matrix in a bundle's folder; `name` ends in `#prefill` for a second copy."""

    folder: Path
    name: str
    shape: Shape
    part: Part


def mapped(file: Path, offset: int, size: int) -> npt.NDArray[np.uint8]:
    """Bytes of a file that can be written to."""
    return np.memmap(file, np.uint8, "r+", offset, (size,))
