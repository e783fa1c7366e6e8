"""Rows of float32 to the integers of a scheme of kind "int", with scales found by search; in no format's words.

A row is cut into groups of neighbours (the last may be shorter), each stored as unsigned codes with one scale and one
zero: value = (code - zero) * scale. So a profile means the same in every format, and a format only packs the codes.
Symmetric groups of 32 are GGUF's too: Q4_0's values at 4 bits, and at 8 bits Q8_0 to the last bit.

Rounding takes the scale that puts a group's largest value on the last code. The search tries a few scales around it,
asks for each set of codes which scale fits them best (least squares), and keeps what has the least error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vlmedge.errors import CheckpointError, UsageError
from vlmedge.session import F32, U8

# Values searched at once. Smaller tiles fit the L2 cache, but threads then take Python's lock from each other every
# 20 microseconds: at 2**15 two threads were slower than one, at 2**19 they are 1.7 times as fast.
_TILE = 1 << 19
_LONG = 512  # from this length on, groups lie along a tile's rows, which keeps numpy's inner loops long

# By how many steps of the plain grid the largest value may overshoot the last code. Chosen greedily among 180 trials
# on Gaussian and t(4) groups of 32 and 128 at 4 bits; trying them all lowers the error by another 0.1 to 0.4 %.
_STEPS = (0.0, 0.32, -0.32, 0.8, -0.8, 0.48, 1.12, -1.12, 1.44, 1.92)
_ASYMMETRIC_STEPS = (0.0, 0.9, -0.9, 1.8, -1.8, 1.2, -0.3, 2.4)
_OTHER_ZERO_STEPS = (0.3, 1.5)  # with the zero rounded to the other side
# Long groups: the largest value as a multiple of the last code. They have outliers to cut off.
_CUTS = (1.04, 1.08, 1.2, 1.4, 1.7, 2.2)
_FINE_CUTS = _CUTS[:2]  # 8 bits and no importance: more costs more than it wins, even in t(3) rows of 8192

_TINY = np.float32(np.finfo(np.float32).tiny)
_SIGN = np.uint32(0x80000000)
_ALMOST_HALF = np.uint32(0x3EFFFFFF)  # the float before 0.5; with 0.5 itself the float before it would round to 1

Scales = npt.NDArray[np.float16 | np.float32]


@dataclass(frozen=True, slots=True)
class Grid:
    """The values a scheme can store: `bits` 2 to 8 per code, `group` neighbours to a scale (0: the whole row).

    A symmetric grid has its zero in the middle of the codes; any other stores an integer zero per group.
    """

    bits: int
    group: int
    symmetric: bool = True

    def __post_init__(self) -> None:
        """Refuse with a UsageError what bytes cannot store."""
        if not 2 <= self.bits <= 8:
            raise UsageError(f"a grid has {self.bits} bits per value; possible: 2 to 8")
        if self.group < 0:
            raise UsageError(f"a grid has groups of {self.group} values; give a count, or 0 for the whole row")

    @property
    def middle(self) -> int:
        """The code of zero in a symmetric grid."""
        return 1 << (self.bits - 1)

    @property
    def lowest(self) -> int:
        """The lowest code in use: at 8 bits symmetric it is 1 (-127), as in Q8_0 and as int8 products want it."""
        return 1 if self.symmetric and self.bits == 8 else 0

    @property
    def highest(self) -> int:
        """The highest code."""
        return (1 << self.bits) - 1

    @property
    def scale_type(self) -> type[np.float16] | type[np.float32]:
        """How scales are stored: float16 by the group, float32 by the row, where their bytes do not count."""
        return np.float16 if self.group else np.float32


@dataclass(frozen=True, slots=True)
class Codes:
    """Encoded rows: value = (code - zero) * scale.

    `codes`: uint8 [n, k]. `scales`: [n, groups] float16, or float32 where a group is the whole row; any sign.
    `zeros`: uint8 [n, groups], or None where the zero is the grid's `middle` throughout.
    """

    codes: U8
    scales: Scales
    zeros: U8 | None


def encode(rows: F32, grid: Grid, importance: F32 | None = None) -> Codes:
    """Encode float32 [n, k], k > 0, so that sum(importance * (rows - decoded)**2) is small in every group.

    `importance`: float32 [k] >= 0, the mean square of what each column is multiplied with; None: all columns alike.
    A group is never worse than plain rounding. A group whose plain scale underflows is all zeros, with scale 0.
    Several threads may call this at once.
    Raises CheckpointError for NaN, infinite values, and groups whose scale float16 cannot hold (8 bits: |x| > 8e6).
    """
    n, k = rows.shape
    tile = _Tile(max(1, min(n, _TILE // k)), k, grid, importance)
    codes = np.empty((n, k), np.uint8)
    scales = np.empty((n, tile.groups), grid.scale_type)
    zeros = None if grid.symmetric else np.empty((n, tile.groups), np.uint8)
    for start in range(0, n, tile.rows):
        part = slice(start, start + tile.rows)
        if n - start < tile.rows:
            tile = _Tile(n - start, k, grid, importance)
        tile.load(rows[part])
        fit = tile.plain() if grid.bits == 8 and grid.group else _search(tile)  # a search wins nothing in small groups
        tile.store(fit, codes[part], scales[part], None if zeros is None else zeros[part])
    return Codes(codes, scales, zeros)


def decode(codes: Codes, grid: Grid) -> F32:
    """Return the values that the codes stand for: float32 [n, k]."""
    k = codes.codes.shape[1]
    size = grid.group or k
    values = codes.codes.astype(np.float32)
    values -= np.float32(grid.middle) if codes.zeros is None else np.repeat(codes.zeros, size, axis=1)[:, :k]
    values *= np.repeat(codes.scales.astype(np.float32), size, axis=1)[:, :k]
    return values


@dataclass(frozen=True, slots=True)
class _Fit:
    """A choice per group of a tile: the scale as a multiple of the plain one, the zero, the error in plain scales."""

    ratio: F32
    zero: F32
    error: F32

    def take_better(self, other: _Fit) -> None:
        """Overwrite the groups in which `other` has the smaller error."""
        better = other.error < self.error
        for mine, theirs in ((self.ratio, other.ratio), (self.zero, other.zero), (self.error, other.error)):
            np.copyto(mine, theirs, where=better)


class _Tile:
    """Some rows at work. Arrays are [group size, groups] or, for long groups, [groups, group size].

    Figures per group have these axes too, one of length 1. `values` are in multiples of the plain scale.
    """

    def __init__(self, rows: int, columns: int, grid: Grid, importance: F32 | None) -> None:
        self.rows, self.columns, self.grid = rows, columns, grid
        self.size = grid.group or columns
        self.groups = -(-columns // self.size)
        self.axis = int(self.size >= _LONG)
        shape = (rows * self.groups, self.size) if self.axis else (self.size, rows * self.groups)
        self.values, self._codes, self._rest = (np.empty(shape, np.float32) for _ in range(3))
        # Zeros behind the last column: zero is on every grid, so they have no error and no say.
        self._padded = np.zeros((rows, self.groups * self.size), np.float32)
        self.weights = None if importance is None else np.empty(shape, np.float32)
        if importance is not None and self.weights is not None:
            self._fill(self.weights, np.broadcast_to(importance / max(importance.mean(), _TINY), (rows, columns)))
        self.scale = self.zero = np.empty(0, np.float32)

    def load(self, rows: F32) -> None:
        """Take over rows [rows, columns]; find the plain scale and zero of each group."""
        self._fill(self.values, rows)
        top, bottom = self.values.max(self.axis, keepdims=True), self.values.min(self.axis, keepdims=True)
        self.scale, self.zero = _plain(top, bottom, self.grid)
        self.values *= _inverse(self.scale)

    def _fill(self, array: F32, rows: F32) -> None:
        if self.columns % self.size:
            self._padded[:, : self.columns] = rows
            rows = self._padded
        self._by_row(array)[:] = rows.reshape(self.rows, self.groups, self.size)

    def store(self, fit: _Fit, codes: U8, scales: Scales, zeros: U8 | None) -> None:
        """Write the codes of the last rounding and what `fit` says of the groups into these rows."""
        self._codes += fit.zero
        np.copyto(codes, self._by_row(self._codes).reshape(self.rows, -1)[:, : self.columns], casting="unsafe")
        scales[:] = (self.scale * fit.ratio).reshape(scales.shape)
        if zeros is not None:
            zeros[:] = fit.zero.reshape(zeros.shape)

    def plain(self) -> _Fit:
        """Round as C's roundf does (halves away from zero), before the scale is rounded: ggml's Q8_0 is made so."""
        half = self._rest.view(np.uint32)
        np.bitwise_or(np.bitwise_and(self.values.view(np.uint32), _SIGN, out=half), _ALMOST_HALF, out=half)
        np.trunc(np.add(self._rest, self.values, out=self._rest), out=self._codes)
        self._clip(np.rint(self.zero))
        return self.start()

    def start(self) -> _Fit:
        """The plain scale and zero, and no error known."""
        one = np.ones_like(self.scale)
        return _Fit(one, np.rint(self.zero), np.full_like(one, np.inf))

    def trial(self, factor: float, zero: F32) -> _Fit:
        """Round at the plain scale / `factor`; then the scale, not yet rounded, that fits these codes best.

        The error lacks the sum of squares, which all trials share; what float32 loses by that decides near-ties only.
        """
        self.round(np.float32(factor), zero)
        along, power = self._sum(self.values, self._codes), self._sum(self._codes, self._codes)
        ratio: F32 = np.divide(along, np.maximum(power, _TINY))
        return _Fit(ratio, zero, np.negative(along * ratio))

    def settle(self, fit: _Fit) -> _Fit:
        """Round the scale as it is stored, then the values at it; the error is measured."""
        limit = float(np.finfo(self.grid.scale_type).max)
        stored = _stored(np.clip(self.scale * fit.ratio, -limit, limit), self.grid)
        ratio = stored * _inverse(self.scale)
        self.round(_inverse(ratio), fit.zero)
        np.subtract(self.values, np.multiply(self._codes, ratio, out=self._rest), out=self._rest)
        return _Fit(ratio, fit.zero.copy(), self._sum(self._rest, self._rest))

    def round(self, factor: F32 | np.float32, zero: F32) -> None:
        """Set the codes to the nearest ones of values * factor, less the zero."""
        np.rint(np.multiply(self.values, factor, out=self._codes), out=self._codes)
        self._clip(zero)

    def _clip(self, zero: F32) -> None:
        codes, grid = self._codes, self.grid
        if grid.symmetric:
            np.clip(codes, grid.lowest - grid.middle, grid.highest - grid.middle, out=codes)
        else:  # np.clip is slow where its bounds are arrays
            np.minimum(np.maximum(codes, grid.lowest - zero, out=codes), grid.highest - zero, out=codes)

    def _sum(self, a: F32, b: F32) -> F32:
        """Sums of weight * a * b over each group."""
        kept = "i" if self.axis else "j"
        if self.weights is None:
            return np.expand_dims(np.einsum(f"ij,ij->{kept}", a, b), self.axis)
        return np.expand_dims(np.einsum(f"ij,ij,ij->{kept}", a, b, self.weights), self.axis)

    def _by_row(self, array: F32) -> F32:
        """A view of a tile's array as [rows, groups, size]."""
        if self.axis:
            return array.reshape(self.rows, self.groups, self.size)
        return np.moveaxis(array.reshape(self.size, self.rows, self.groups), 0, 2)


def _search(tile: _Tile) -> _Fit:
    """The best stored scale and zero that the trials lead to; leaves the tile's codes rounded at it."""
    start = tile.start()
    best = tile.settle(start)
    for factor, zero in _trials(tile):
        start.take_better(tile.trial(factor, zero))
    best.take_better(tile.settle(start))
    tile.round(_inverse(best.ratio), best.zero)
    return best


def _trials(tile: _Tile) -> Iterator[tuple[float, F32]]:
    """What to divide the plain scale by, and the zeros."""
    grid, zero = tile.grid, np.rint(tile.zero)
    if tile.size >= _LONG:
        yield from ((cut, zero) for cut in (_FINE_CUTS if grid.bits == 8 and tile.weights is None else _CUTS))
    elif grid.symmetric:
        yield from ((1 + step / grid.middle, zero) for step in _STEPS)
        yield -1.0, zero  # the largest value at the end with one code fewer; its counterpart may be as large
    else:
        other = np.floor(tile.zero) + np.ceil(tile.zero) - zero
        yield from ((1 + step / grid.highest, zero) for step in _ASYMMETRIC_STEPS)
        yield from ((1 + step / grid.highest, other) for step in _OTHER_ZERO_STEPS)


def _plain(top: F32, bottom: F32, grid: Grid) -> tuple[F32, F32]:
    """The scales and zeros, neither rounded, that put the ends of the values on the ends of the codes.

    A scale that would be stored as 0 is 0. Raises CheckpointError for ends that have no scale.
    """
    if not (np.isfinite(top).all() and np.isfinite(bottom).all()):
        raise CheckpointError("rows to quantize hold NaN or infinite values; the checkpoint cannot be exported")
    if grid.symmetric:  # the largest value gets the far end of the codes, so the scale may be negative
        largest = np.where(top >= -bottom, top, bottom)
        scale: F32 = (
            np.divide(np.abs(largest), np.float32(127))
            if grid.bits == 8
            else np.divide(largest, np.float32(-grid.middle))
        )
        zero = np.full_like(scale, grid.middle)
    else:
        width = np.maximum(top, np.float32(0)) - np.minimum(bottom, np.float32(0))
        scale = np.divide(width, np.float32(grid.highest))
        offset: F32 = np.multiply(-bottom, _inverse(scale))
        zero = np.clip(offset, np.float32(0), np.float32(grid.highest))
    stored = _stored(scale, grid)
    if not np.isfinite(stored).all():
        raise CheckpointError(
            f"{grid.bits} bits in groups of {grid.group}: values of {bottom.min():.3g} to {top.max():.3g} need "
            "scales beyond float16's 65504; keep the tensor in floats, or give it group_size = 0 (float32 scales)"
        )
    return np.where(stored == 0, np.float32(0), scale), zero


def _stored(scale: F32, grid: Grid) -> F32:
    """Scales as float32 after rounding to the stored type; infinite where that cannot hold them."""
    if grid.scale_type is np.float32:
        return np.where(np.abs(scale) < _TINY, np.float32(0), scale)  # denormals have infinite inverses
    with np.errstate(over="ignore"):
        return scale.astype(np.float16).astype(np.float32)


def _inverse(scale: F32) -> F32:
    """1 / scale, and 0 for 0."""
    return np.divide(1, scale, out=np.zeros_like(scale), where=np.abs(scale) >= _TINY)
