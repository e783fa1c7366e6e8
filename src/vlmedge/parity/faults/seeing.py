"""Sessions that encode, stitch or locate something else."""

from __future__ import annotations

import numpy as np

from vlmedge.parity.faults.sessions import Passing
from vlmedge.session import F32, U8, Grid


class Blue(Passing):
    """Pixels in the order BGR."""

    def vision(self, pixels: U8) -> F32:
        """Encode crops."""
        return super().vision(np.ascontiguousarray(pixels[..., ::-1]))


class Sideways(Passing):
    """Crops with x and y exchanged."""

    def vision(self, pixels: U8) -> F32:
        """Encode crops."""
        return super().vision(np.ascontiguousarray(pixels.transpose(0, 2, 1, 3)))


class CropsReversed(Passing):
    """The features of several crops of one call in another order."""

    def vision(self, pixels: U8) -> F32:
        """Encode crops."""
        return np.ascontiguousarray(super().vision(pixels)[::-1])


class LocalByColumns(Passing):
    """Local crops' features in column order."""

    def project(self, features: F32, tiling: Grid) -> F32:
        """Project one picture's features."""
        order = np.arange(1, len(features)).reshape(tiling).T.ravel() if len(features) > 2 else [1]
        return super().project(features[[0, *order]], tiling)


class NoGlobal(Passing):
    """The first local crop in the place of the global one."""

    def project(self, features: F32, tiling: Grid) -> F32:
        """Project one picture's features."""
        return super().project(features[[1, *range(1, len(features))]], tiling)


class NoLocal(Passing):
    """The global crop in the place of the local ones."""

    def project(self, features: F32, tiling: Grid) -> F32:
        """Project one picture's features."""
        return super().project(features[[0] * len(features)], tiling)


class TilingTurned(Passing):
    """Rows and columns of the tiling exchanged."""

    def project(self, features: F32, tiling: Grid) -> F32:
        """Project one picture's features."""
        return super().project(features, (tiling[1], tiling[0]))


class BinsFlipped(Passing):
    """Coordinate bins counted from the other end."""

    def head(self, name: str, inputs: F32) -> F32:
        """Run a region head."""
        out = super().head(name, inputs)
        return out[::-1].copy() if name == "coord_decoder" else out


class HeightFirst(Passing):
    """Sizes are height and width."""

    def head(self, name: str, inputs: F32) -> F32:
        """Run a region head."""
        return super().head(name, inputs[::-1].copy() if name == "size_encoder" else inputs)
