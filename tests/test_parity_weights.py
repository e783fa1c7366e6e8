"""Weights in units of their grid's step: right encodings of every type stay well inside, losses of one group do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from vlmedge.exporters import Grain, Readback
from vlmedge.exporters.gguf import quantizer
from vlmedge.exporters.gguf import reader as gguf_reader
from vlmedge.exporters.gguf.dequantizer import GRAINS
from vlmedge.exporters.gguf.dequantizer import decode as gguf_decode
from vlmedge.exporters.gguf.ggml import TYPES
from vlmedge.exporters.onnx.kinds import KINDS
from vlmedge.parity.report import StageResult
from vlmedge.parity.weights import MOST_RMS, compare_weights
from vlmedge.quant_profiles import grids
from vlmedge.session import F32
from vlmedge.tensors import ArrayTensor

NAME = "decoder.layers.0.mlp.up.weight"
ROWS, COLUMNS = 64, 1024
INTEGERS = {f"gguf {name}": grain for name, grain in GRAINS.items() if grain.bits < 16}
INTEGERS |= {f"onnx {name}": Grain(kind.bits, kind.block) for name, kind in KINDS.items() if not kind.floating}
FLOATS = {f"gguf {name}": grain for name, grain in GRAINS.items() if grain.bits >= 16}
FLOATS |= {f"onnx {name}": Grain(kind.bits) for name, kind in KINDS.items() if kind.floating}


def stored(values: F32, kind: str) -> F32:
    """What an exporter's encoder keeps of a matrix."""
    format_, name = kind.split()
    if format_ == "gguf":
        return gguf_decode(quantizer.encode(values, TYPES[name]), TYPES[name], values.shape[1])
    if KINDS[name].floating:
        return values.astype(np.float16 if KINDS[name].bits == 16 else np.float32).astype(np.float32)
    return grids.decode(grids.encode(values, KINDS[name].grid), KINDS[name].grid)


def compared(wanted: F32, found: F32, grain: Grain, name: str = NAME) -> StageResult:
    tensors = {name: ArrayTensor(found)}
    return compare_weights({name: ArrayTensor(wanted)}, Readback(tensors, {name: grain}, {}, {}), 1)


def worst(result: StageResult) -> float:
    return (result.numbers or {}).get("steps_rms", float("inf"))


def rows(seed: int) -> Iterator[tuple[str, F32]]:
    """Matrices as checkpoints have them, and worse ones."""
    rng = np.random.default_rng(seed)

    def normal(size: int) -> Any:
        return rng.standard_normal((ROWS, COLUMNS // size, size))

    def apart(size: int, spread: Any) -> Any:
        """A size of its own for every `size` neighbours."""
        return normal(size) * spread((ROWS, COLUMNS // size, 1))

    spikes, means = normal(COLUMNS), 0.1 * normal(16) + normal(1).reshape(ROWS, -1, 16)[:, :, :1]
    spikes[..., ::256] *= 30
    found = {
        "even": normal(COLUMNS),
        "heavy tails": rng.standard_t(3, (ROWS, COLUMNS)),
        "uneven 16": apart(16, lambda shape: np.exp(rng.normal(0, 1.5, shape))),
        "uneven 32": apart(32, lambda shape: np.exp(rng.normal(0, 1.5, shape))),
        "decades": apart(16, lambda shape: 10.0 ** rng.uniform(-4, 0, shape)),
        "spikes": spikes,
        "far from zero": np.abs(normal(COLUMNS)) + 3,
        "below zero": means - 2,
        "other means": means,
        "nearly nothing": normal(COLUMNS) * 10.0 ** rng.uniform(-8, -3, (ROWS, 1, 1)),
        "zeros": np.zeros((ROWS, COLUMNS)),
    }
    yield from ((name, values.reshape(ROWS, COLUMNS).astype(np.float32)) for name, values in found.items())


@pytest.mark.parametrize("kind", [*INTEGERS, *FLOATS])
def test_right_encodings_stay_below_two_thirds_of_the_limit(kind: str, record_property: Callable[[str, object], None]):
    grain = {**INTEGERS, **FLOATS}[kind]
    found: dict[str, float] = {}
    for seed in range(10):
        for name, values in rows(seed):
            result = compared(values, stored(values, kind), grain)
            assert result.outcome == "passed", (name, result.why)
            found[name] = max(found.get(name, 0.0), worst(result))
    record_property("worst", found)
    assert {name: value for name, value in found.items() if value > MOST_RMS * 2 / 3} == {}


def lost(values: F32, grain: Grain) -> F32:
    """Of every 1024 values one group that shares a scale is zero."""
    out = values.copy()
    out[:, 32 : 32 + (grain.group or COLUMNS)] = 0
    return out


def of_the_next(values: F32, grain: Grain) -> F32:
    """Every group with the next one's scale."""
    groups = values.reshape(-1, grain.group or COLUMNS)
    scales = np.abs(groups).max(axis=1, keepdims=True)
    return np.asarray(groups / scales * np.roll(scales, -1, axis=0), np.float32).reshape(values.shape)


def one_off(values: F32, grain: Grain) -> F32:
    """A zero point that is one step off."""
    groups = values.reshape(-1, grain.group or COLUMNS)
    width = groups.max(axis=1, keepdims=True) - groups.min(axis=1, keepdims=True)
    return np.asarray(groups + width / ((1 << grain.bits) - 1), np.float32).reshape(values.shape)


def swapped(values: F32, grain: Grain) -> F32:
    return np.roll(values, COLUMNS // 2, axis=1)


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("damage", [lost, of_the_next, one_off, swapped])
def test_damage_fails(kind: str, damage: Callable[[F32, Grain], F32]):
    for seed in range(10):
        values = np.random.default_rng(seed).standard_normal((ROWS, COLUMNS)).astype(np.float32)
        result = compared(values, damage(stored(values, kind), INTEGERS[kind]), INTEGERS[kind])
        assert result.outcome == "failed", worst(result)
        assert result.why.startswith(f"{NAME} is not the checkpoint's: off by ")


@pytest.mark.parametrize("kind", [kind for kind, grain in INTEGERS.items() if grain.whole and grain.bits > 2])
def test_a_group_that_is_lost_beside_larger_ones_fails(kind: str):
    """32 of every 1024 values, in every row, beside others that are fifteen times as large."""
    for seed in range(10):
        values = np.random.default_rng(seed).standard_normal((ROWS, COLUMNS)).astype(np.float32)
        values[:, 32:64] /= 15
        found = stored(values, kind)
        assert compared(values, found, INTEGERS[kind]).outcome == "passed"
        found[:, 32:64] = 0
        assert compared(values, found, INTEGERS[kind]).outcome == "failed"


@pytest.mark.parametrize("kind", FLOATS)
def test_a_float_that_is_wrong_fails(kind: str):
    values = np.random.default_rng(3).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    for factor, outcome in ((1.0, "passed"), (1 + 2.0**-5, "failed")):
        assert compared(values, stored(values, kind) * np.float32(factor), FLOATS[kind]).outcome == outcome
    coarser = stored(values, "gguf BF16")  # is no f16
    assert compared(values, coarser, FLOATS[kind]).outcome == ("passed" if kind == "gguf BF16" else "failed")


def test_short_groups_count_their_own_values_only():
    """The last group of a row of 132 has 4 values."""
    values = np.random.default_rng(3).standard_normal((ROWS, 132)).astype(np.float32)
    found = stored(values, "onnx int4_128")
    assert compared(values, found, Grain(4, 128)).outcome == "passed"
    found[:, 128:] = 0
    assert compared(values, found, Grain(4, 128)).outcome == "failed"


@pytest.mark.parametrize("kind", ["gguf F32", "gguf F16", "gguf BF16", "gguf Q8_0", "gguf Q6_K", "gguf Q4_K"])
@pytest.mark.parametrize("uneven", [1, 30])
def test_both_arrays_of_a_joined_layer_are_judged(kind: str, uneven: int):
    """[global | local] is stored as global + local and local, here with groups of one that are larger in the other."""
    rng, grain = np.random.default_rng(5), {**INTEGERS, **FLOATS}[kind]
    wide, local = (rng.standard_normal((ROWS, COLUMNS)).astype(np.float32) for _ in range(2))
    local[:, 64:96] *= uneven
    wide[:, 512:544] *= uneven
    fold, half = stored(wide + local, kind), stored(local, kind)
    wanted, joined = np.concatenate([wide, local], axis=1), gguf_reader._coarser(grain, grain)
    result = compared(wanted, np.concatenate([fold - half, half], axis=1), joined)
    assert result.outcome == "passed"
    assert worst(result) <= MOST_RMS * 2 / 3
    for found in ([fold, half], [half, fold - half], [fold - half, half * np.float32(1.3)]):
        assert compared(wanted, np.concatenate(found, axis=1), joined).outcome == "failed"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["checkpoint", "export"])
@pytest.mark.parametrize("grain", [Grain(32), Grain(16), Grain(8, 32), GRAINS["Q4_K"]], ids=str)
def test_values_that_are_not_finite_fail_by_name(value: float, side: str, grain: Grain):
    """In any block of several, without a warning."""
    values = np.random.default_rng(3).standard_normal((6 * 1024, 1024)).astype(np.float32)
    spoiled = values.copy()
    spoiled[4 * 1024 + 3, 700] = value
    pair = (spoiled, values) if side == "checkpoint" else (values, spoiled)
    result = compared(*pair, grain)
    assert result.outcome == "failed"
    assert result.why == f"{NAME} cannot be compared: the {side} has NaN or infinite values in it"


def test_numbers_too_large_for_their_difference_fail():
    values = np.full((4, 256), 3e38, np.float32)
    for grain in (Grain(32), Grain(16, mantissa=7), Grain(8, 32), GRAINS["Q4_K"]):
        assert compared(values, -values, grain).outcome == "failed"
        assert compared(-values / 2, values, grain).outcome == "failed"


def test_another_shape_fails_by_name():
    values = np.ones((4, 256), np.float32)
    result = compared(values, values.reshape(8, 128), Grain(32))
    assert result.why == f"{NAME} cannot be compared: it is [8, 128], the checkpoint's [4, 256]"


def test_a_second_copy_is_named():
    values = np.ones((4, 256), np.float32)
    tensors = {NAME: ArrayTensor(values), f"{NAME}#prefill": ArrayTensor(values * 2)}
    result = compare_weights({NAME: ArrayTensor(values)}, Readback(tensors, dict.fromkeys(tensors, Grain(32)), {}, {}))
    assert result.why.startswith(f"{NAME}#prefill is not")
