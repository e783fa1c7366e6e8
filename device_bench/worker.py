"""The process that does one job: `python -m vlmedge.device_bench.worker` reads it on stdin and prints its reply last.

With `--units` it prints what can compute here instead. Whatever libraries print goes to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal, TextIO

from vlmedge.device_bench import agreement, memory
from vlmedge.device_bench.agreement import Truth
from vlmedge.device_bench.costs import costs
from vlmedge.device_bench.energy import meter, metered
from vlmedge.device_bench.environment import environment
from vlmedge.device_bench.job import Job, Variant
from vlmedge.device_bench.measuring import Asked, Subject
from vlmedge.device_bench.others import Others
from vlmedge.device_bench.page_cache import drop, fill
from vlmedge.device_bench.result import Agreement, Load, Memory, Reply
from vlmedge.errors import MissingExtraError, UnavailableError, VlmedgeError
from vlmedge.loading import describe, load, local_folder
from vlmedge.records import decode, encode
from vlmedge.runtimes import RUNTIMES
from vlmedge.skills import Model


def work(job: Job) -> Reply:
    """Do a job in this process; every expected failure is a reply with a status and a reason."""
    try:
        if job.kind == "anchor":
            return _anchor(job)
        assert job.variant is not None, "every job but an anchor has a model"
        if job.variant.runtime not in RUNTIMES:
            return Reply("unavailable", f"this version has no runtime '{job.variant.runtime}'; upgrade vlmedge there")
        return _model(job, job.variant)
    except (MissingExtraError, UnavailableError) as error:
        return Reply("unavailable", str(error))
    except MemoryError:
        return Reply("out_of_memory", "the process could not get the memory that it asked for")
    except VlmedgeError as error:
        return Reply("failed", str(error))


def units() -> dict[str, dict[str, str]]:
    """What can compute here: runtime -> unit -> "" or why not.

    Runtimes try what they find, and a GPU's driver stays in memory: a process that measures does not ask.
    """
    return {name: dict(RUNTIMES[name].units()) for name in RUNTIMES}


def main(arguments: list[str], stdin: TextIO, out: TextIO) -> None:
    """Print one line of JSON: the reply to the job on `stdin`, or with --units what can compute here."""
    if arguments == ["--units"]:
        print(json.dumps(units()), file=out)
        return
    job = decode(Job, json.loads(stdin.read()), "the job")
    print(json.dumps(encode(work(job)), allow_nan=False), file=out)


def _anchor(job: Job) -> Reply:
    from vlmedge.device_bench.ceiling import measure

    others = Others()
    ceiling = measure(job.threads)
    return Reply("ok", ceiling=ceiling, others=others.mean(), threads=ceiling.threads, environment=environment())


def _model(job: Job, variant: Variant) -> Reply:
    """Open a variant's model and measure it."""
    _bind(variant.affinity)
    folder = local_folder(variant.source) or _fetched(variant)
    import_ms = _timed(lambda: _import(RUNTIMES[variant.runtime].libraries))
    files = _cached(job, folder)
    memory.reset_peak()
    baseline = memory.resident_mb()
    start = time.perf_counter()
    model = _open(variant)
    load_ms = (time.perf_counter() - start) * 1000
    with model:
        reply = _measured(job, variant, model, baseline)
    return replace(reply, load=Load(round(load_ms, 2), round(import_ms, 2), files))


def _open(variant: Variant) -> Model:
    return load(
        variant.source,
        variant.runtime,
        variant.threads,
        memory=variant.memory,
        context=variant.context,
        dtype=variant.dtype or "f32",
        provider=variant.unit,
        allow_pickle=variant.allow_pickle,
    )


def _measured(job: Job, variant: Variant, model: Model, baseline: float | None) -> Reply:
    """Time and weigh an opened model first; then what would disturb both."""
    loaded = memory.resident_mb()
    subject = Subject(model)
    subject.warm_up(job.work)
    others = Others()
    with metered(meter(variant.unit)) as energy:
        asked = subject.measure(job.work)
    taken = others.mean()
    anonymous, mapped = memory.split_mb()
    used = Memory(baseline, loaded, memory.peak_mb(), anonymous, mapped, memory.gpu_peak_mb())
    info = model.session.info()
    facts = environment() | {"session": info}
    if job.kind == "reference":
        facts["truth"] = encode(_truth(variant, subject, asked, job))
    return Reply(
        "ok",
        samples=tuple(asked.samples),
        counts=tuple(asked.counts.values()),
        memory=used,
        energy=energy.energy(len(asked.samples)),
        agreement=_agreement(job, subject, asked),
        costs=costs(variant, model.spec, _positions(asked)),
        others=taken,
        threads=info.get("threads"),
        environment=facts,
    )


def _fetched(variant: Variant) -> Path:
    """The folder of a checkpoint that has a name: neither asking the hub nor what it sends is a part of opening."""
    folder = describe(variant.source, allow_pickle=variant.allow_pickle).checkpoint.folder
    os.environ["HF_HUB_OFFLINE"] = "1"
    return folder


def _import(libraries: Sequence[str]) -> None:
    """Import what can be imported; why something cannot, opening tells better."""
    for name in libraries:
        with suppress(ImportError, OSError, RuntimeError):
            importlib.import_module(name)


def _truth(variant: Variant, subject: Subject, asked: Asked, job: Job) -> Truth:
    found = []
    for ask in job.work.asks:
        tokens = asked.tokens[ask.name]
        logits = subject.follow(ask, tokens)
        found.append(agreement.truth_of(ask.name, tokens, logits))
    return Truth(variant.digest, tuple(found))


def _agreement(job: Job, subject: Subject, asked: Asked) -> Agreement | None:
    if not job.truth:
        return None
    truth = agreement.read_truth(job.truth)
    along = {}
    for ask in job.work.asks:
        wanted = truth.of(ask.name)
        along[ask.name] = agreement.followed(wanted, subject.follow(ask, wanted.tokens))
    model = subject.model
    return agreement.agreement(truth, dict(asked.tokens), along, model.tokenizer, model.spec.prompt.stop)


def _positions(asked: Asked) -> int:
    """Positions in the KV cache at the middle of an answer, in mean over the asks."""
    counts = asked.counts.values()
    return round(sum(c.image_tokens + c.prompt_tokens + c.generated / 2 for c in counts) / max(1, len(counts)))


def _bind(processors: tuple[int, ...]) -> None:
    """Stay on these processors, if any are named. Raises UnavailableError where that cannot be."""
    if not processors:
        return
    if not hasattr(os, "sched_setaffinity"):
        raise UnavailableError("this system binds no process to processors; leave out --affinity")
    try:
        os.sched_setaffinity(0, processors)
    except OSError:
        asked, there = (", ".join(map(str, sorted(found))) for found in (processors, os.sched_getaffinity(0)))
        raise UnavailableError(f"the processors {asked} are not here; it has {there}") from None


def _cached(job: Job, folder: Path) -> Literal["cold", "warm", ""]:
    """Bring the model's files to where opening shall find them; "" where the system does not do so."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    if job.cold:
        return "cold" if drop(files) else ""
    return "warm" if fill(files) else ""


def _timed(run: Callable[[], object]) -> float:
    """Milliseconds that `run` takes."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1000


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what native libraries print must not come after the reply
    main(sys.argv[1:], sys.stdin, answers)
    answers.flush()
