"""The grids of quantization: the same as GGUF's where they have the same name, and never worse than rounding."""

import threading

import gguf
import numpy as np
import pytest

from vlmedge.errors import CheckpointError, UsageError
from vlmedge.exporters.gguf import quantizer
from vlmedge.exporters.gguf.ggml import TYPES
from vlmedge.quant_profiles.grids import Codes, Grid, decode, encode

GRIDS = [Grid(bits, group, symmetric) for bits in range(2, 9) for group in (32, 128, 0) for symmetric in (True, False)]
SEEDS = (1, 2, 3)


def sample(seed: int, n: int = 12, k: int = 1000) -> np.ndarray:
    """Rows with what checkpoints have: tails, outlier columns, offsets, bf16 values with ties, small and empty rows."""
    rng = np.random.default_rng(seed)
    rows = np.where(rng.random((n, 1)) < 0.5, rng.standard_normal((n, k)), rng.standard_t(4, (n, k))).astype(np.float32)
    rows[:, :3] *= 20
    rows[1] += 2
    rows[2] = (rows[2].view(np.uint32) & 0xFFFF0000).view(np.float32)
    rows[3, 100:400] = 0
    rows[4] *= 1e-5
    rows[5] = np.abs(rows[5])
    rows[6] *= 1e-9
    rows[7] = np.rint(rows[7] * 2)
    return rows


def in_groups(values: np.ndarray, grid: Grid) -> np.ndarray:
    size = grid.group or values.shape[1]
    return np.pad(values, ((0, 0), (0, -values.shape[1] % size))).reshape(len(values), -1, size)


def rounded(rows: np.ndarray, grid: Grid) -> np.ndarray:
    """Plain rounding to a grid, written from its definition: groups of decoded values."""
    groups = in_groups(rows, grid)
    high = 2**grid.bits - 1
    if grid.symmetric:
        zero = 2 ** (grid.bits - 1)
        largest = np.take_along_axis(groups, np.abs(groups).argmax(2)[..., None], 2)
        scale = np.abs(largest) / 127 if grid.bits == 8 else largest / -zero
    else:
        top, bottom = np.maximum(groups.max(2, keepdims=True), 0), np.minimum(groups.min(2, keepdims=True), 0)
        scale = (top - bottom) / np.float32(high)
        zero = np.rint(-bottom * (1 / np.where(scale == 0, 1, scale)))
    steps = groups * (1 / np.where(scale == 0, 1, scale))
    # As in ggml: by the scale as it was before rounding, halves away from zero.
    codes = np.clip(np.trunc(steps + np.copysign(np.float32(0.49999997), steps)) + zero, 0, high)
    return (codes - zero) * scale.astype(np.float16 if grid.group else np.float32).astype(np.float32)


def errors(rows: np.ndarray, decoded: np.ndarray, grid: Grid, weight: np.ndarray) -> np.ndarray:
    """Weighted squared error of every group, in float64."""
    difference = in_groups(rows, grid).astype(np.float64) - decoded
    return (in_groups(weight[None], grid) * difference**2).sum(2)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_no_group_is_worse_than_rounding(grid, weighted):
    for seed in SEEDS:
        rows = sample(seed)
        importance = np.random.default_rng(seed).lognormal(0, 2, rows.shape[1]).astype(np.float32)
        weight = importance if weighted else np.ones_like(importance)
        codes = encode(rows, grid, importance if weighted else None)
        ours = errors(rows, in_groups(decode(codes, grid), grid), grid, weight)
        plain = errors(rows, rounded(rows, grid), grid, weight)
        power = errors(rows, np.float32(0), grid, weight)
        # What float32 leaves of an error: the values that it is the difference of have 24 bits.
        assert (ours <= plain * (1 + 1e-5) + power * 1e-8).all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_what_is_stored(grid):
    rows = sample(4)
    codes = encode(rows, grid)
    groups = -(-rows.shape[1] // (grid.group or rows.shape[1]))
    assert codes.codes.dtype == np.uint8
    assert codes.codes.shape == rows.shape
    assert codes.codes.max() < 2**grid.bits
    assert codes.scales.dtype == (np.float16 if grid.group else np.float32)
    assert codes.scales.shape == (len(rows), groups)
    assert np.isfinite(codes.scales).all()
    assert (codes.zeros is None) == grid.symmetric
    if codes.zeros is not None:
        assert codes.zeros.dtype == np.uint8
        assert codes.zeros.shape == codes.scales.shape
        assert codes.zeros.max() < 2**grid.bits
    if grid.symmetric and grid.bits == 8:
        assert codes.codes.min() >= 1  # -127: int8 products may rely on it


# How much of rounding's squared error must be gone, for Gaussian and for t(4) rows; measured: 1 to 2 % more.
GAINS = [
    (Grid(4, 32), 0.10, 0.065),
    (Grid(4, 32, False), 0.085, 0.065),
    (Grid(4, 128), 0.105, 0.12),
    (Grid(4, 128, False), 0.095, 0.08),
    (Grid(2, 32), 0.14, 0.185),
    (Grid(4, 0), 0.28, 0.46),
]


@pytest.mark.parametrize(("grid", "gaussian", "heavy"), GAINS, ids=str)
def test_the_search_wins(grid, gaussian, heavy):
    rng = np.random.default_rng(5)
    weight = np.ones(2048)
    for rows, gain in ((rng.standard_normal((32, 2048)), gaussian), (rng.standard_t(4, (32, 2048)), heavy)):
        rows = rows.astype(np.float32)
        ours = errors(rows, in_groups(decode(encode(rows, grid), grid), grid), grid, weight).sum()
        assert ours <= (1 - gain) * errors(rows, rounded(rows, grid), grid, weight).sum()


@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(4, 128, False), Grid(8, 0)], ids=str)
def test_importance_moves_the_error_to_columns_that_do_not_matter(grid):
    rows = sample(6, k=1024)
    importance = np.random.default_rng(6).lognormal(0, 2, rows.shape[1]).astype(np.float32)
    free = errors(rows, in_groups(decode(encode(rows, grid), grid), grid), grid, importance).sum()
    told = errors(rows, in_groups(decode(encode(rows, grid, importance), grid), grid), grid, importance).sum()
    assert told < 0.95 * free
    # Only the proportions count.
    assert np.array_equal(encode(rows, grid, importance).codes, encode(rows, grid, importance * 1024).codes)


def test_columns_of_no_importance_are_rounded_plainly():
    rows = sample(12)[:3]
    nothing = np.zeros(rows.shape[1], np.float32)
    for grid in (Grid(4, 32), Grid(4, 128, False), Grid(8, 0)):
        decoded = in_groups(decode(encode(rows, grid, nothing), grid), grid)
        plain = errors(rows, rounded(rows, grid), grid, np.ones(rows.shape[1]))
        assert (errors(rows, decoded, grid, np.ones(rows.shape[1])) <= plain * (1 + 1e-5)).all()


def test_eight_bits_in_groups_of_32_are_ggmls_q8_0():
    for seed in SEEDS:
        rows = sample(seed, n=40, k=1024)
        theirs = gguf.dequantize(
            quantizer.encode(rows, TYPES["Q8_0"]).reshape(len(rows), -1), gguf.GGMLQuantizationType.Q8_0
        )
        grid = Grid(8, 32)
        assert np.array_equal(decode(encode(rows, grid), grid), theirs)


def test_halves_round_away_from_zero_as_in_ggml():
    row = np.zeros((1, 32), np.float32)
    row[0, :9] = (
        127,
        0.5,
        -0.5,
        1.5,
        -1.5,
        2.5,
        -126.5,
        np.nextafter(np.float32(0.5), 0),
        np.nextafter(np.float32(-2.5), 0),
    )
    codes = encode(row, Grid(8, 32)).codes.astype(int) - 128
    assert codes[0, :9].tolist() == [127, 1, -1, 2, -2, 3, -127, 0, -2]


def test_four_bits_in_groups_of_32_can_be_packed_as_q4_0():
    grid = Grid(4, 32)
    rows = sample(7, n=40, k=1024)
    codes = encode(rows, grid)
    halves = codes.codes.reshape(-1, 2, 16)  # Q4_0: element i in the low, element i + 16 in the high half byte
    blocks = np.concatenate([codes.scales.reshape(-1, 1).view(np.uint8), halves[:, 0] | halves[:, 1] << 4], axis=1)
    theirs = gguf.dequantize(blocks.reshape(len(rows), -1), gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(decode(codes, grid), theirs)
    plain = gguf.dequantize(
        quantizer.encode(rows, TYPES["Q4_0"]).reshape(len(rows), -1), gguf.GGMLQuantizationType.Q4_0
    )
    weight = np.ones(rows.shape[1])
    ours, ggml = (errors(rows, in_groups(values, grid), grid, weight) for values in (theirs, plain))
    assert (ours <= ggml * (1 + 1e-5)).all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_empty_groups_are_zero(grid):
    for rows in (np.zeros((3, 200), np.float32), np.full((3, 200), 1e-42, np.float32)):
        codes = encode(rows, grid)
        assert (decode(codes, grid) == 0).all()
        zeros = grid.middle if codes.zeros is None else np.repeat(codes.zeros, grid.group or 200, axis=1)[:, :200]
        assert (codes.codes == zeros).all()
        assert (codes.scales == 0).all()


@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(4, 32, False), Grid(8, 32), Grid(8, 0)], ids=str)
def test_a_short_last_group_is_what_it_is_alone(grid):
    rows = sample(8, k=75)
    whole = decode(encode(rows, grid), grid)
    if grid.group:
        assert np.array_equal(whole[:, 64:], decode(encode(rows[:, 64:], grid), grid))
        assert np.array_equal(whole[:, :64], decode(encode(rows[:, :64], grid), grid))
    assert whole.shape == rows.shape


@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(4, 128, False), Grid(8, 32), Grid(8, 0)], ids=str)
def test_rows_do_not_depend_on_their_company(grid):
    """Blocks of rows of any size give the same bytes, in any number of threads."""
    rows = sample(9, n=37, k=2048)
    whole = encode(rows, grid)
    parts: dict[int, Codes] = {}
    threads = [
        threading.Thread(target=lambda at=at: parts.update({at: encode(rows[at : at + 5], grid)}))
        for at in range(0, 37, 5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(whole.codes, np.concatenate([parts[at].codes for at in sorted(parts)]))
    assert np.array_equal(whole.scales, np.concatenate([parts[at].scales for at in sorted(parts)]))


@pytest.mark.parametrize("shape", [(0, 64), (3, 1), (1, 40000)])
def test_any_shape(shape):
    rows = np.random.default_rng(10).standard_normal(shape).astype(np.float32)
    for grid in (Grid(4, 32), Grid(4, 128, False), Grid(8, 0)):
        assert decode(encode(rows, grid), grid).shape == shape


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_large_values_are_kept(grid):
    rows = sample(11)
    rows *= 6e4 / np.abs(rows).max()
    decoded = decode(encode(rows, grid), grid)
    assert np.abs(decoded).max() > 2e4
    assert np.isfinite(decoded).all()


def test_a_scale_beyond_float16_is_refused():
    rows = np.zeros((2, 64), np.float32)
    rows[1, 40] = 1e7
    for grid in (Grid(4, 32), Grid(4, 32, False), Grid(8, 32)):
        with pytest.raises(CheckpointError, match=r"values of 0 to 1e\+07 need scales beyond float16"):
            encode(rows, grid)
    assert decode(encode(rows, Grid(8, 0)), Grid(8, 0))[1, 40] == pytest.approx(1e7)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(4, 32, False), Grid(8, 32), Grid(8, 0)], ids=str)
def test_values_that_are_no_numbers_are_refused(value, grid):
    rows = np.ones((2, 64), np.float32)
    rows[1, 3] = value
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        encode(rows, grid)


@pytest.mark.parametrize(("bits", "group"), [(1, 32), (9, 32), (4, -1)])
def test_grids_that_cannot_be(bits, group):
    with pytest.raises(UsageError):
        Grid(bits, group)
