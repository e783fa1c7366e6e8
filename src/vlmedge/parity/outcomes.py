"""From what was found at a stage to its result: the same words for every check, here and on a device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlmedge.limits import Against
from vlmedge.parity.metrics import finite
from vlmedge.parity.report import Outcome, StageResult


def judged_numbers(
    stage: str,
    against: Against | None,
    limit: float | None,
    relative: float,
    most: float,
    numbers: dict[str, float] | None = None,
    ambiguous: int = 0,
    parting: str = "",
) -> StageResult:
    """Numbers that may be off by `limit` (relative RMS); `most`: the largest difference.

    `parting`: why the stage fails whatever its numbers, "" where nothing does. None as limit: measured, not judged.
    """
    why = parting
    if limit is not None and relative > limit:
        why = f"relative RMS {relative:.1e}, at most {limit:.1e} is allowed"
    if not np.isfinite(relative):
        why = "numbers are not finite or of another shape"
    outcome: Outcome = "failed" if why else "measured" if limit is None else "passed"
    return StageResult(stage, against, outcome, finite(relative), finite(most), limit, numbers, ambiguous, why)


def judged_facts(stage: str, wrong: Sequence[str], numbers: dict[str, float]) -> StageResult:
    """What is equal or not: `wrong` holds a line for each that is not."""
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    why = wrong[0] + more if wrong else ""
    return StageResult(stage, None, "failed" if wrong else "passed", numbers=numbers, why=why)
