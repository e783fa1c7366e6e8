"""Every stored tensor beside the checkpoint's: is it that tensor, as near as its grid allows?

Needs no model to run and no noise to be judged against: an integer of b bits and a scale over a group of values
cannot be off by more than about half a step, whatever the weights are. What is in another tensor's place, transposed,
cut, lost, or has a scale or an offset that is wrong shows in units of that step.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from vlmedge.exporters import Grain, Readback
from vlmedge.parity.metrics import finite
from vlmedge.parity.report import Outcome, StageResult
from vlmedge.progress import Progress
from vlmedge.session import F32
from vlmedge.spec import component
from vlmedge.tensors import Tensor

# Rounding leaves 0.29 steps RMS; scales that are searched, or are themselves rounded (K-quants), leave more. The worst
# group of every type, over ten seeds of even, heavy-tailed and very uneven rows (tests/test_parity_weights.py) and ten
# random models (benchmarks/gate.py), stays below two thirds of this. A single value may be further off: a search for
# the best scale clips outliers, and Q4_0 and Q5_0 have no code for one end of a symmetric group.
MOST_RMS = 0.75
# A group whose own step is at least this part of the largest around it has a scale of 4 or more of a 6-bit scale's
# steps: it is not lost. 1.3: right encodings lose less than 0.65 of such a group's RMS, one that is lost all of it.
_PRESENT, _LOST = 1 / 16, 1.3
# However small a stored f16 scale is, it is up to 2^-25 off; integers of up to 127 multiply it, in a `whole` two.
_LEAST, _LEAST_WHOLE = 2.0**-17, 2.0**-12
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class _Error:
    """Squared error and squared norm of a block; the worst group's RMS and largest error, in steps.

    `flaw`: what makes a comparison pointless; all errors are then infinite.
    """

    squares: float
    norm: float
    most: float
    rms: float
    value: float
    flaw: str = ""


def compare_weights(
    original: Mapping[str, Tensor], stored: Readback, threads: int | None = None, progress: Progress | None = None
) -> StageResult:
    """Compare every tensor of `stored` with its original.

    `relative_rms` is over all weights; `numbers` holds that of each component, and of the worst group of all
    (in its grid's steps) the RMS and the largest error.
    """
    progress = progress or Progress()
    progress.stage("comparing the stored weights", sum(t.size for t in stored.tensors.values()))
    sums: dict[str, list[float]] = {}
    worst, most, value, wrong = 0.0, 0.0, 0.0, ""
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        for name, tensor in stored.tensors.items():
            wanted, grain = original[name.partition("#")[0]], stored.grains[name]
            errors = list(pool.map(lambda at, a=wanted, b=tensor, g=grain: _block(a, b, g, *at), _units(tensor)))
            error = _total(errors)
            progress.advance(tensor.size)
            worst, most, value = max(worst, error.rms), max(most, error.most), max(value, error.value)
            total = sums.setdefault(component(name), [0.0, 0.0])
            total[0], total[1] = total[0] + error.squares, total[1] + error.norm
            if not wrong and not error.rms <= MOST_RMS:
                wrong = _why(name, error)
    numbers = {name: math.sqrt(a / b) if b else 0.0 for name, (a, b) in sums.items()}
    relative = math.sqrt(sum(a for a, _ in sums.values()) / (sum(b for _, b in sums.values()) or 1.0))
    numbers |= {"steps_rms": worst, "steps_most": most, "tensors": len(stored.tensors)}
    told = {key: number for key, number in numbers.items() if math.isfinite(number)}
    outcome: Outcome = "failed" if wrong else "passed"
    return StageResult("weights", None, outcome, finite(relative), finite(value), None, told, 0, wrong)


def _total(errors: list[_Error]) -> _Error:
    squares, norm = math.fsum(e.squares for e in errors), math.fsum(e.norm for e in errors)
    most, rms, value = (max((getattr(e, part) for e in errors), default=0.0) for part in ("most", "rms", "value"))
    return _Error(squares, norm, most, rms, value, next((e.flaw for e in errors if e.flaw), ""))


def _why(name: str, error: _Error) -> str:
    if error.flaw:
        return f"{name} cannot be compared: {error.flaw}"
    relative = math.sqrt(error.squares / error.norm) if error.norm else math.inf
    return (
        f"{name} is not the checkpoint's: off by {error.rms:.2g} steps of its grid in its worst group "
        f"(largest {error.most:.2g}), relative RMS {relative:.1e}"
    )


def _units(tensor: Tensor) -> Iterator[tuple[int, int]]:
    step = max(1, _BLOCK // max(1, tensor.columns))
    return ((start, min(start + step, tensor.rows)) for start in range(0, tensor.rows, step))


def _block(original: Tensor, stored: Tensor, grain: Grain, start: int, stop: int) -> _Error:
    if original.shape != stored.shape:
        return _flawed(f"it is {list(stored.shape)}, the checkpoint's {list(original.shape)}")
    wanted, found = original.read_rows(start, stop), stored.read_rows(start, stop)
    for side, values in (("the checkpoint", wanted), ("the export", found)):
        if not np.isfinite(values).all():
            return _flawed(f"{side} has NaN or infinite values in it")
    with np.errstate(over="ignore"):  # differences too large for float32 are infinite, and so is what comes of them
        error = np.abs(found - wanted)
        steps, counts = _in_steps(error, wanted, grain)
        rms = float(np.sqrt(np.sum(np.square(steps), axis=-1) / counts).max(initial=0.0))
        squares, norm = (float(np.vdot(x, x)) for x in (error, wanted))
    return _Error(squares, norm, float(steps.max(initial=0.0)), rms, float(error.max(initial=0.0)))


def _flawed(flaw: str) -> _Error:
    return _Error(math.inf, 1.0, math.inf, math.inf, math.inf, flaw)


def _in_steps(error: F32, wanted: F32, grain: Grain) -> tuple[F32, F32]:
    """Errors [n, columns] over the distance of neighbouring values: [n, groups, group], and how many each group has.

    Of what is the difference of two stored arrays, the distance is the sum of both.
    """
    columns = wanted.shape[1]
    if grain.bits >= 16:
        floats: F32 = error / _added(wanted, grain, _float_steps)
        return floats[:, None], np.full(1, columns, np.float32)
    group = grain.group or columns // grain.pieces
    steps = _added(wanted, grain, _group_steps)
    counts = _grouped(np.ones((1, columns), np.float32), group).sum(axis=-1)
    out: F32 = _grouped(error, group) / np.clip(steps, np.float32(1e-30), np.float32(1e38))[:, :, None]
    return out, counts


def _added(wanted: F32, grain: Grain, steps: Callable[[F32, Grain], F32]) -> F32:
    """The steps of stored rows; of rows [global | local] those of global + local are added to the left half's."""
    if grain.pieces == 1:
        return steps(wanted, grain)
    left, right = np.split(wanted, 2, axis=1)
    local = steps(right, grain)
    return np.concatenate([steps(left + right, grain) + local, local], axis=1)


def _float_steps(wanted: F32, grain: Grain) -> F32:
    """Of each value: a float's own distance. f32 is copied, or added up."""
    digits, least = (10, 2.0**-24) if grain.bits == 16 else (20, 2.0**-60)
    if grain.mantissa:  # BF16: the range is that of f32
        digits, least = grain.mantissa, 2.0**-126
    out: F32 = np.abs(wanted) * np.float32(2.0**-digits) + np.float32(least)
    return out


def _group_steps(wanted: F32, grain: Grain) -> F32:
    """Of each group: float32 [n, groups].

    Where the scales of a `whole` are rounded together, the largest has a say in all: `share` of its step in those of
    up to `_PRESENT` of it, and less the larger they are.
    """
    grouped = _grouped(wanted, grain.group or wanted.shape[1])
    own: F32 = np.abs(grouped).max(axis=-1) * np.float32(2 / ((1 << grain.bits) - 1))
    if not grain.whole:
        plain: F32 = own + np.float32(_LEAST if grain.group else 0.0)
        return plain
    largest = _largest(own, grain.whole // grain.group)
    part = own / np.maximum(largest, np.float32(1e-30))
    shared = largest * np.float32(grain.share) * np.minimum(1, _PRESENT / np.maximum(part, np.float32(1e-30)))
    step = own + shared
    if grain.bits > 2:  # two bits lose as much of a bad group as zeros would
        kept = np.sqrt(np.mean(np.square(grouped), axis=-1)) * np.float32(_LOST)
        step = np.where(part >= _PRESENT, np.minimum(step, kept), step)
    out: F32 = step + np.float32(_LEAST_WHOLE)
    return out


def _largest(own: F32, count: int) -> F32:
    """The largest of each `count` neighbours [n, groups], in the place of each."""
    most: F32 = np.repeat(_grouped(own, count).max(axis=-1), count, axis=1)[:, : own.shape[1]]
    return most


def _grouped(rows: F32, group: int) -> F32:
    """[n, columns] -> [n, groups, group], zeros behind the last column."""
    short = -rows.shape[1] % group
    padded = np.pad(rows, ((0, 0), (0, short))) if short else rows
    return padded.reshape(len(rows), -1, group)
