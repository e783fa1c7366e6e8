"""An evaluation on a Ray cluster: small parts of it as tasks, whose answers are taken as they come back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from vlmedge import __version__, errors
from vlmedge.errors import RuntimeFailedError, UsageError, VlmedgeError
from vlmedge.evaluation.dataset import DEMO, open_dataset
from vlmedge.evaluation.job import Shard, Task, answer, opened, todo
from vlmedge.evaluation.row import Row, read_row
from vlmedge.loading import local_folder
from vlmedge.progress import Progress
from vlmedge.raycluster import NOBODY, Errand, Ray, cancel, check_file, connected, cpus, errand, failed, nodes, one_line
from vlmedge.records import decode
from vlmedge.skills import Model

QUESTIONS = 32  # of a part: what a dead machine costs at most; opening the model takes as long as a few of them
THREADS = 4  # of a part, unless the user says otherwise: a copy of the model for so many cores
RETRIES = 5  # of a part whose process or machine died; one that kills its process is not tried for ever
PATIENCE = 10.0  # seconds without an answer before the nodes are counted


@dataclass(frozen=True, slots=True)
class Part:
    """What one Ray task answers: a shard, the ids that it leaves out, those that it answers, and who takes them."""

    shard: Shard
    done: list[str]
    left: set[str]
    emit: Callable[[Row], None]


def run(tasks: list[Task], progress: Progress, *, address: str) -> None:
    """Answer the tasks on the cluster at `address`: HOST:PORT, ray://HOST:PORT or "auto".

    Each goes in parts of about 32 questions, which take `Shard.threads` CPUs (by default 4, or as many as the smallest
    node has). Ray begins a part again whose process or machine died; each question is emitted once. Where this
    process is connected already, that cluster is used and stays connected. Standard output is silent meanwhile: Ray
    would print the logs of a lost machine there.

    Raises MissingExtraError without Ray, UsageError for an address that is none or more threads than a node has CPUs,
    RuntimeFailedError for a cluster that cannot be reached or a part that was lost six times, and what
    `job.answer` raised on a node. What was emitted before is kept.
    """
    with connected(address, "docs/eval.md") as ray:
        offered = _cpus(ray)
        threads = _threads(tasks, offered)
        slots = sum(cpu // threads for cpu in offered)
        remote = ray.remote(num_cpus=threads, max_retries=RETRIES, scheduling_strategy="SPREAD")(_errand())
        parts = [part for task in tasks for part in split(task, threads, slots)]
        sent = {remote.remote(__version__, json.dumps(asdict(p.shard)), p.done): p for p in parts}
        try:
            _collect(ray, sent, threads, progress)
        finally:
            cancel(ray, list(sent))  # after an error or Ctrl-C


def split(task: Task, threads: int, slots: int) -> list[Part]:
    """The parts of a task that have something to answer: of about 32 questions, and at least one for each of `slots`.

    A picture is never divided. Files get absolute paths: a worker runs in another folder.
    """
    data = task.shard.data if task.shard.data == DEMO else os.path.abspath(task.shard.data)
    shard = replace(task.shard, source=_source(task.shard.source), data=data, threads=threads)
    dataset = open_dataset(shard.data, shard.pictures)
    left = todo(dataset, shard, task.done)
    questions = sum(len(asked) for _, asked in left)
    parts = []
    for part in shard.split(min(len(left), max(-(-questions // QUESTIONS), slots)) or 1):
        asked = {q.id for _, questions in todo(dataset, part, task.done) for q in questions}
        mine = dataset.pictures[part.index :: part.count]
        done = [q.id for picture in mine for q in picture.questions if q.id in task.done]
        if asked:
            parts.append(Part(part, done, asked, task.emit))
    return parts


def answer_part(shard: str, done: list[str]) -> str:
    """What runs on a worker: answer a shard (JSON of `Shard`) but for the ids `done`.

    Returns JSON: `rows` (of `Row`), or `error` (the class of a VlmedgeError) and its `text`. Errors go as data, because
    Ray would wrap them in its own and run into those that cannot be pickled.
    """
    rows: list[Row] = []
    try:
        asked = decode(Shard, json.loads(shard), "the shard")
        _check_files(asked)
        answer(asked, frozenset(done), rows.append, opener=_kept)
    except VlmedgeError as error:
        return failed(error)
    return json.dumps({"rows": [row.as_dict() for row in rows]})


_KEPT: dict[Shard, Model] = {}  # by what opening depends on: a worker's process holds the model of its last part


@contextmanager
def _kept(shard: Shard, progress: Progress) -> Iterator[Model]:
    """The shard's model, left open for the next part: until another is asked for, or it fails."""
    key = replace(shard, label="", data="", pictures=None, data_digest="", index=0, count=1, max_tokens=None)
    if key not in _KEPT:
        _drop()
        _KEPT[key] = opened(shard, progress)
    with ExitStack() as stack:
        stack.callback(_drop)
        yield _KEPT[key]
        stack.pop_all()


def _drop() -> None:
    while _KEPT:
        _KEPT.popitem()[1].close()


def _errand() -> Errand:
    """The task: `answer_part` on a node, after it was seen that the vlmedge there is this one."""
    return errand("vlmedge.evaluation.cluster:answer_part", "evaluate")


def _cpus(ray: Ray) -> list[int]:
    return [cpus(node) for node in nodes(ray)]


def _threads(tasks: list[Task], offered: list[int]) -> int:
    """How many CPUs a part takes."""
    asked = max((task.shard.threads or 0 for task in tasks), default=0)
    if not offered:
        raise RuntimeFailedError(NOBODY)
    if asked > max(offered):
        raise UsageError(
            f"--threads {asked} is more than any node of the Ray cluster has; the largest has {max(offered)}"
        )
    return asked or min(THREADS, *offered)


def _collect(ray: Ray, sent: dict[Any, Part], threads: int, progress: Progress) -> None:
    """Take what comes back out of `sent`, until it is empty."""
    told = False
    while sent:
        ready, _ = ray.wait(list(sent), timeout=PATIENCE)
        for reference in ready:
            reply = _reply(ray, reference)
            _take(sent.pop(reference), reply, progress)
        alone = not ready and max(_cpus(ray), default=0) < threads
        if alone and not told:
            progress.note("the Ray cluster has lost every node that is large enough; waiting for one")
        told = alone


def _reply(ray: Ray, reference: Any) -> dict[str, Any]:
    try:
        reply: dict[str, Any] = json.loads(ray.get(reference))
    except ray.exceptions.RayTaskError:
        raise  # a bug: it carries the worker's traceback
    except ray.exceptions.OutOfMemoryError:
        raise RuntimeFailedError("a node of the Ray cluster ran out of memory; give a higher --threads") from None
    except ray.exceptions.RayError as error:
        raise RuntimeFailedError(f"a part of the evaluation was lost {RETRIES + 1} times: {one_line(error)}") from None
    return reply


def _take(part: Part, reply: dict[str, Any], progress: Progress) -> None:
    """Emit the rows, each id once; or raise what the worker raised."""
    if "error" in reply:
        kind: type[VlmedgeError] = getattr(errors, reply["error"])
        raise kind.__new__(kind, reply["text"])  # as it stands: some classes compose their text
    for data in reply["rows"]:
        row = read_row(data, "an answer of a Ray worker")
        if row.id in part.left:
            part.left.remove(row.id)
            part.emit(row)
            progress.advance(1)


def _check_files(shard: Shard) -> None:
    for path in (shard.source, shard.data):
        check_file(path)


def _source(source: str) -> str:
    """A folder by its absolute path; a name as it is."""
    folder = local_folder(source)
    return source if folder is None else os.path.abspath(folder)
