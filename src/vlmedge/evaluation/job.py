"""A part of an evaluation as plain data, and the function that answers it, in this process or on another machine."""

from __future__ import annotations

from collections.abc import Callable, Container
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

from vlmedge.errors import UsageError
from vlmedge.evaluation.asking import ask_all
from vlmedge.evaluation.dataset import Dataset, open_dataset
from vlmedge.evaluation.question import Picture, Question
from vlmedge.evaluation.row import Row
from vlmedge.loading import load
from vlmedge.progress import Progress
from vlmedge.skills import Model
from vlmedge.subject import fingerprint

Todo = list[tuple[Picture, list[Question]]]


@dataclass(frozen=True, slots=True)
class Shard:
    """The pictures i of a question set with i % `count` == `index`, to be answered by one model.

    Plain data: it can be pickled or sent as JSON, and means the same on every machine that has the same files.

    `source`: a bundle or a checkpoint, `label` its row in the tables. `data`: "demo" or the path of a JSONL file;
    `pictures`: only so many of its first (None: all). `model_digest` and `data_digest` are what `source` and `data`
    must be (`subject.fingerprint`, `Dataset.digest`). The rest is as in `loading.load` and the skills.
    """

    source: str
    label: str
    data: str
    pictures: int | None
    model_digest: str
    data_digest: str
    index: int = 0
    count: int = 1
    runtime: str | None = None
    threads: int | None = None
    dtype: str = "f32"
    max_tokens: int | None = None
    allow_pickle: bool = False

    def split(self, parts: int) -> list[Shard]:
        """As many shards that together are this one, for as many workers."""
        return [replace(self, index=self.index + self.count * i, count=self.count * parts) for i in range(parts)]


@dataclass(frozen=True, slots=True)
class Task:
    """A shard, the ids of its questions that are answered already, and who takes the new answers.

    `emit` writes to disk on the machine that asked, and skips an id that it has had before: a shard that was begun
    again elsewhere may emit what its first worker did.
    """

    shard: Shard
    done: frozenset[str]
    emit: Callable[[Row], None]


# Gives a shard's model for as long as it answers: `opened`, or what keeps it for the next shard.
Opener: TypeAlias = "Callable[[Shard, Progress], AbstractContextManager[Model]]"


class Runner(Protocol):
    """Answers tasks: `run_here`, or `cluster.run` with its address bound. It advances `progress` once per row."""

    def __call__(self, tasks: list[Task], progress: Progress) -> None:
        """Return when every task is done; what was emitted before an error is kept."""
        ...


def run_here(tasks: list[Task], progress: Progress) -> None:
    """Answer the tasks one after the other in this process."""
    for task in tasks:
        answer(task.shard, task.done, task.emit, progress)


def opened(shard: Shard, progress: Progress) -> Model:
    """The shard's model; raises UsageError where `source` is not what `model_digest` says, and what `load` raises."""
    if fingerprint(shard.source, allow_pickle=shard.allow_pickle) != shard.model_digest:
        raise UsageError(f"{shard.source} is not the model that was asked for; its files have changed")
    return load(
        shard.source,
        shard.runtime,
        shard.threads,
        dtype=shard.dtype,
        allow_pickle=shard.allow_pickle,
        progress=progress,
    )


def answer(
    shard: Shard,
    done: Container[str],
    emit: Callable[[Row], None],
    progress: Progress | None = None,
    opener: Opener = opened,
) -> None:
    """Ask the shard's questions whose ids are not in `done`; `emit` gets each row as soon as it is there.

    Nothing is opened where nothing is left to ask. Raises UsageError where `data` is not what the shard's digest says,
    and what `opener` raises.
    """
    progress = progress or Progress()
    left = todo(open_dataset(shard.data, shard.pictures), shard, done)
    if not left:
        return
    with opener(shard, progress) as model:
        for row in ask_all(model, left, shard.max_tokens):
            emit(row)
            progress.advance(1)


def todo(dataset: Dataset, shard: Shard, done: Container[str]) -> Todo:
    """The shard's pictures with the questions that are left; raises UsageError for another question set."""
    if dataset.digest != shard.data_digest:
        raise UsageError(f"{shard.data} is not the question set that was asked for; the file or a picture has changed")
    mine = dataset.pictures[shard.index :: shard.count]
    left = [(picture, [q for q in picture.questions if q.id not in done]) for picture in mine]
    return [(picture, questions) for picture, questions in left if questions]
