"""Every stored tensor beside the checkpoint's: is it that tensor, as near as its grid allows?

Needs no model to run and no noise to be judged against: an integer of b bits and a scale over a group of values
cannot be off by more than about half a step, whatever the weights are. What is in another tensor's place, transposed,
cut, or has a scale or an offset that is wrong shows in units of that step.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vlmedge.exporters import Grain, Readback
from vlmedge.parity.metrics import finite
from vlmedge.parity.report import Outcome, StageResult
from vlmedge.progress import Progress
from vlmedge.session import F32
from vlmedge.spec import component
from vlmedge.tensors import Tensor

# Rounding leaves 0.29 steps RMS; scales that are searched, or are themselves rounded (K-quants), leave more. The worst
# group of every type over ten random models (benchmarks/gate.py) stays below two thirds of this. A single value may be
# further off: a search for the best scale clips outliers. What is the difference of two stored pieces has the errors of
# both, one of them twice as coarse.
MOST_RMS = 0.75
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class _Error:
    """Squared error and squared norm of a block; the worst group's RMS and largest error, in steps."""

    squares: float
    norm: float
    most: float
    rms: float
    value: float


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
            if not wrong and not error.rms <= MOST_RMS * (2 * grain.pieces - 1):
                wrong = _why(name, error)
    numbers = {name: math.sqrt(a / b) if b else 0.0 for name, (a, b) in sums.items()}
    relative = math.sqrt(sum(a for a, _ in sums.values()) / (sum(b for _, b in sums.values()) or 1.0))
    numbers |= {"steps_rms": worst, "steps_most": most, "tensors": len(stored.tensors)}
    told = {key: number for key, number in numbers.items() if math.isfinite(number)}
    outcome: Outcome = "failed" if wrong else "passed"
    return StageResult("weights", None, outcome, finite(relative), finite(value), None, told, 0, wrong)


def _total(errors: list[_Error]) -> _Error:
    squares, norm = math.fsum(e.squares for e in errors), math.fsum(e.norm for e in errors)
    return _Error(squares, norm, max(e.most for e in errors), max(e.rms for e in errors), max(e.value for e in errors))


def _why(name: str, error: _Error) -> str:
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
        return _Error(math.inf, 1.0, math.inf, math.inf, math.inf)
    wanted, found = original.read_rows(start, stop), stored.read_rows(start, stop)
    if not np.isfinite(found).all():
        return _Error(math.inf, 1.0, math.inf, math.inf, math.inf)
    error = np.abs(found - wanted)
    steps = _in_steps(error, wanted, grain)
    rms = float(np.sqrt(np.mean(np.square(steps), axis=-1)).max(initial=0.0))
    squares, norm = (float(np.vdot(x, x)) for x in (error, wanted))
    return _Error(squares, norm, float(steps.max(initial=0.0)), rms, float(error.max(initial=0.0)))


def _in_steps(error: F32, wanted: F32, grain: Grain) -> npt.NDArray[np.float32]:
    """Errors [n, columns] as [n, groups, group], over the distance of neighbouring values of each group's grid."""
    if grain.bits >= 16:
        # A float's own distance; where pieces are added up, that of the largest. f32 is copied.
        digits, least = (10, 2.0**-24) if grain.bits == 16 else (20, 2.0**-60)
        size = np.abs(wanted) if grain.pieces == 1 else np.abs(wanted).max(axis=-1, keepdims=True)
        floats: F32 = error / (size * np.float32(2.0**-digits) + np.float32(least))
        return floats[:, None]
    group = grain.group or wanted.shape[1]
    grouped, errors = _grouped(np.abs(wanted), group), _grouped(error, group)
    step = grouped.max(axis=-1, keepdims=True) * np.float32(2 / ((1 << grain.bits) - 1))
    out: F32 = errors / np.maximum(step, np.float32(1e-30))
    return out


def _grouped(rows: F32, group: int) -> F32:
    """[n, columns] -> [n, groups, group], zeros behind the last column."""
    short = -rows.shape[1] % group
    padded = np.pad(rows, ((0, 0), (0, short))) if short else rows
    return padded.reshape(len(rows), -1, group)
