"""evaluate(): a question set asked of several models, resumable, with their scores side by side."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from vlmedge.errors import UsageError
from vlmedge.evaluation.dataset import Dataset, open_dataset
from vlmedge.evaluation.job import Runner, Shard, Task, run_here, todo
from vlmedge.evaluation.journal import SCHEMA, Asked, Journal, answered, journal_path, opened
from vlmedge.evaluation.row import Row
from vlmedge.evaluation.summary import Evaluation, pair, score
from vlmedge.loading import SourceLike
from vlmedge.picture import check_picture
from vlmedge.progress import Progress
from vlmedge.runtimes import RUNTIMES
from vlmedge.subject import Subject, examine


@dataclass(frozen=True, slots=True)
class Settings:
    """How the models are asked, as in `job.Shard`; `runtime` is for bundles, `dtype` for checkpoints."""

    runtime: str | None = None
    threads: int | None = None
    dtype: str = "f32"
    max_tokens: int | None = None
    allow_pickle: bool = False


def evaluate(
    sources: Sequence[SourceLike],
    data: SourceLike = "demo",
    *,
    original: SourceLike | None = None,
    pictures: int | None = None,
    shard: tuple[int, int] = (0, 1),
    out: SourceLike | None = None,
    settings: Settings | None = None,
    runner: Runner = run_here,
    progress: Progress | None = None,
) -> Evaluation:
    """Ask bundles or checkpoints a question set (`open_dataset`) and score what they answer.

    `original`: a checkpoint that the others are compared with (else the first of `sources` is that). `shard` (i, n):
    only every n-th picture from the i-th on. Every answer is written into the folder `out` (here unless given, named
    after the question set) as soon as it is there; what stands there, from any shard, is not asked again. Raises
    UsageError for what cannot be meant, OutputError for a folder with answers of other models, questions or settings,
    and what `load` raises.
    """
    progress, settings = progress or Progress(), settings or Settings()
    dataset = open_dataset(os.fspath(data), pictures, progress)
    _check(dataset, sources, shard)
    subjects = _subjects(sources, original, settings, progress)
    folder = Path(out) if out is not None else Path(f"eval-{_digest(dataset, settings)}")
    with ExitStack() as stack:
        works = [stack.enter_context(_work(s, dataset, pictures, shard, folder, settings)) for s in subjects]
        left = sum(_left(dataset, work.task) for work in works)
        progress.stage(f"asking {len(works)} model{'s' * (len(works) > 1)}", left)
        runner([work.task for work in works], progress)
        answers = [work.answers() for work in works]
    return _summed(dataset, subjects, answers, folder, original is not None)


@dataclass(frozen=True, slots=True)
class _Work:
    """A task with where its answers are."""

    task: Task
    journal: Journal
    elsewhere: dict[str, Row]

    def answers(self) -> dict[str, Row]:
        return self.elsewhere | self.journal.rows


@contextmanager
def _work(
    subject: Subject,
    dataset: Dataset,
    pictures: int | None,
    shard: tuple[int, int],
    folder: Path,
    settings: Settings,
) -> Iterator[_Work]:
    """The shard of one model with its journal open."""
    runtime = _runtime(subject, settings)
    dtype = "" if subject.is_bundle else settings.dtype
    asked = Asked(SCHEMA, subject.label, subject.digest, dataset.digest, runtime, dtype, settings.max_tokens or 0)
    path = journal_path(folder, asked, *shard)
    work = Shard(
        subject.source,
        subject.label,
        dataset.name,
        pictures,
        subject.digest,
        dataset.digest,
        *shard,
        runtime=runtime,
        threads=settings.threads,
        dtype=settings.dtype,
        max_tokens=settings.max_tokens,
        allow_pickle=settings.allow_pickle,
    )
    with opened(path, asked) as journal:
        elsewhere = answered(folder, asked, path)
        done = frozenset(elsewhere.keys() | journal.rows.keys())
        yield _Work(Task(work, done, journal.add), journal, elsewhere)


def _check(dataset: Dataset, sources: Sequence[SourceLike], shard: tuple[int, int]) -> None:
    """What can be refused before a model is looked at."""
    index, count = shard
    if not 0 <= index < count:
        raise UsageError(f"a shard is I/N with I from 0 to N - 1, not {index}/{count}")
    if not sources:
        raise UsageError("an evaluation needs at least one bundle or checkpoint")
    for picture in dataset.pictures:
        if picture.file is not None:
            check_picture(picture.file)


def _subjects(
    sources: Sequence[SourceLike], original: SourceLike | None, settings: Settings, progress: Progress
) -> list[Subject]:
    names = [os.fspath(source) for source in ((original, *sources) if original is not None else sources)]
    subjects = []
    for name, label in zip(names, _labels(names), strict=True):
        progress.stage(f"checking {name}")
        subjects.append(examine(name, label, allow_pickle=settings.allow_pickle, progress=progress))
    twice = [s for n, s in enumerate(subjects) if any(s.digest == other.digest for other in subjects[:n])]
    if twice:
        raise UsageError(f"{twice[0].source} is the same model as another one that is named; a model is asked once")
    if original is not None and subjects[0].is_bundle:
        raise UsageError(f"{names[0]} is a bundle; the original is a checkpoint")
    return subjects


def _labels(names: Sequence[str]) -> list[str]:
    """The last part of each path, where that is enough to tell them apart; other names as they are."""
    last = [Path(name).resolve().name if os.path.isdir(name) else name for name in names]
    return last if len(set(last)) == len(names) else list(names)


def _runtime(subject: Subject, settings: Settings) -> str:
    """The runtime that will answer, by name: a journal tells which it was."""
    if settings.runtime is not None and subject.is_bundle:
        return settings.runtime
    return next((name for name in RUNTIMES if RUNTIMES[name].loads == subject.format), "")


def _left(dataset: Dataset, task: Task) -> int:
    return sum(len(questions) for _, questions in todo(dataset, task.shard, task.done))


def _digest(dataset: Dataset, settings: Settings) -> str:
    """What an evaluation's folder is called after: the questions and how they are asked, not the models."""
    asked = json.dumps([dataset.digest, settings.runtime, settings.dtype, settings.max_tokens])
    return hashlib.sha256(asked.encode()).hexdigest()[:8]


def _summed(
    dataset: Dataset, subjects: Sequence[Subject], answers: Sequence[dict[str, Row]], folder: Path, original: bool
) -> Evaluation:
    """Only what was asked now counts: the folder may hold more pictures."""
    ids = [question.id for picture in dataset.pictures for question in picture.questions]
    rows = [{i: found[i] for i in ids if i in found} for found in answers]
    scores = [
        score(s, list(r.values()), original=original and not n)
        for n, (s, r) in enumerate(zip(subjects, rows, strict=True))
    ]
    base = subjects[0].label
    pairs = [pair(s.label, r, base, rows[0]) for s, r in zip(subjects[1:], rows[1:], strict=True)]
    pictures = len(dataset.pictures)
    return Evaluation(dataset.name, dataset.digest, pictures, len(ids), str(folder), tuple(scores), tuple(pairs))
