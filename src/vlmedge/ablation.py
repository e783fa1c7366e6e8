"""Which part of a bundle pays for its size: a verification, and what each part alone costs in KL and in answers."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from vlmedge.bundle import Bundle, open_bundle
from vlmedge.errors import UsageError
from vlmedge.evaluation.asking import ask_all
from vlmedge.evaluation.dataset import Dataset, open_dataset
from vlmedge.evaluation.row import Row
from vlmedge.evaluation.summary import pair
from vlmedge.exporters import EXPORTERS, Readback
from vlmedge.loading import Described, SourceLike, open_model, open_original
from vlmedge.parity.attribution import RUNTIME, attribute, mixtures
from vlmedge.parity.examine import examine
from vlmedge.parity.report import PartResult, Report
from vlmedge.parity.run import run_tests
from vlmedge.parity.verify import opened
from vlmedge.picture import PictureLike
from vlmedge.progress import Progress
from vlmedge.skills import Model
from vlmedge.sources import DEMO


def ablate(
    bundle: str | os.PathLike[str],
    against: SourceLike | None = None,
    images: Mapping[str, PictureLike] | None = None,
    *,
    data: str | None = None,
    pictures: int | None = None,
    dtype: str = "f32",
    threads: int | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Verify a bundle and measure its parts: one quantized at a time, all others the original's.

    The arguments are those of `verify`. `data`: a question set (`evaluation.open_dataset`) that the original answers
    with each part's stored weights in its place, in `dtype`, of which `pictures` are taken; None: no questions.
    Raises UsageError where the checkpoint is not at hand, and what `verify` raises.
    """
    start, progress = time.perf_counter(), progress or Progress()
    dataset = None if data is None else open_dataset(data, pictures)
    found, original = opened(bundle, against, images or {}, allow_pickle=allow_pickle, progress=progress)
    if original is None:
        raise UsageError(f"to ablate {bundle} its checkpoint is needed; name it with --against")
    progress.stage("running the bundle")
    ran = run_tests(found, images, threads=threads)
    report = examine(found, ran, original, threads=threads, progress=progress)
    stored = EXPORTERS[found.manifest.format].read(found.manifest.model, found.path)
    parts = attribute(ran.trace.record, original, stored, threads=threads, progress=progress)
    if dataset is not None:
        parts = _answered(parts, found, original, stored, dataset, dtype, threads, progress)
    return replace(report, parts=tuple(parts), seconds=round(time.perf_counter() - start, 2))


def _answered(
    parts: list[PartResult],
    bundle: Bundle,
    original: Described,
    stored: Readback,
    dataset: Dataset,
    dtype: str,
    threads: int | None,
    progress: Progress,
) -> list[PartResult]:
    """The parts with what each costs in answers."""
    progress.stage("asking the original", dataset.questions)
    with open_original(original, threads, dtype=dtype) as model:
        base = _rows(model, dataset, progress)
    rows = {}
    for part, tensors in mixtures(original.tensors, stored):
        progress.stage(f"asking with {part} quantized", dataset.questions)
        with open_original(replace(original, tensors=tensors), threads, dtype=dtype) as model:
            rows[part] = _rows(model, dataset, progress)
    progress.stage("asking the bundle", dataset.questions)
    with open_model(bundle, threads=threads) as model:
        rows[RUNTIME] = _rows(model, dataset, progress)
    return [_with_answers(result, rows[result.part], base) for result in parts]


def _rows(model: Model, dataset: Dataset, progress: Progress) -> dict[str, Row]:
    out = {}
    for row in ask_all(model, ((picture, picture.questions) for picture in dataset.pictures)):
        out[row.id] = row
        progress.advance(1)
    return out


def _with_answers(result: PartResult, rows: Mapping[str, Row], base: Mapping[str, Row]) -> PartResult:
    asked = [row for row in rows.values() if row.right is not None]
    beside = pair(result.part, rows, "original", base)
    right = sum(bool(row.right) for row in asked) / len(asked) if asked else 0.0
    return replace(result, right=right, lost=beside.lost, won=beside.won)


def questions_for(bundle: Path, against: str | None) -> str | None:
    """The question set that a bundle of a demo checkpoint is asked where none is named; None for any other."""
    label = against or open_bundle(bundle).manifest.source.label
    return "demo" if label.startswith(DEMO) else None
