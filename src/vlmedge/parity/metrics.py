"""How far apart two results are: relative RMS, largest difference, KL divergence, margins of choices, overlaps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlmedge.session import F32

# By how many times the RMS of its error a row's best entry may be beaten. Of 34,000 choices of right exports of random
# models that differ from the original's, one needed 4.1 (benchmarks/gate.py).
NOISE = 6.0


def difference(ours: F32, theirs: F32) -> tuple[float, float]:
    """Relative RMS (the norm of the difference over the norm of the reference) and the largest absolute difference.

    Both are infinite for arrays of different shapes and for numbers that are not finite.
    """
    if ours.shape != theirs.shape or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return float("inf"), float("inf")
    scale = float(np.linalg.norm(theirs.astype(np.float64))) or 1.0
    delta = ours.astype(np.float64) - theirs
    return float(np.linalg.norm(delta)) / scale, float(np.abs(delta).max(initial=0.0))


def finite(value: float) -> float | None:
    """A number as reports keep it: JSON has no infinity."""
    return float(value) if np.isfinite(value) else None


def centred(logits: F32) -> F32:
    """Logits without what they have in common: softmax does not see it, and norms would be full of it."""
    with np.errstate(invalid="ignore"):  # whoever compares them tells of infinities
        out: F32 = logits - logits.mean(axis=-1, keepdims=True)
    return out


def pooled(pairs: Sequence[tuple[F32, F32]]) -> tuple[float, float]:
    """`difference` over all pairs (ours, theirs) as if they were one array."""
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf"), float("inf")
    return difference(*(np.concatenate([pair[side].ravel() for pair in pairs]) for side in (0, 1)))


def largest(pairs: Sequence[tuple[F32, F32]]) -> float:
    """The largest RMS difference of a single pair (ours, theirs), over the RMS of the reference in all of them."""
    errors = [float(np.sqrt(np.mean(np.square(ours.astype(np.float64) - theirs)))) for ours, theirs in pairs]
    scale = float(np.sqrt(np.mean([np.mean(np.square(theirs, dtype=np.float64)) for _, theirs in pairs])))
    return max(errors) / (scale or 1.0)


def kl_divergence(reference: F32, ours: F32) -> float:
    """KL(reference || ours) in nats of the distributions that two rows of logits float32 [vocab] mean.

    Infinite where they cannot be compared.
    """
    if reference.shape != ours.shape or not (np.isfinite(reference).all() and np.isfinite(ours).all()):
        return float("inf")
    p, q = _log_softmax(reference), _log_softmax(ours)
    return max(0.0, float(np.sum(np.exp(p) * (p - q))))


def margin(values: F32, ours: int) -> float:
    """By how much the best of `values` beats entry `ours`; 0 where that is the best."""
    return float(values.max() - values[ours])


def near_tie(values: F32, ours: int, relative: float) -> bool:
    """Can an error of `relative` RMS turn the choice among `values` from its best entry to `ours`?

    Entries of minus infinity are banned and count as none; what all others have in common is no part of the RMS.
    """
    noise = relative * float(np.std(values[np.isfinite(values)], dtype=np.float64))
    return margin(values, ours) <= NOISE * noise


def _log_softmax(logits: F32) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    shifted = logits.astype(np.float64) - float(logits.max())
    out: np.ndarray[tuple[int], np.dtype[np.float64]] = shifted - np.log(np.sum(np.exp(shifted)))
    return out
