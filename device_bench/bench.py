"""bench(): models measured beside each other and the original, on one or more devices; resumable, with a report."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from vlmedge.device_bench.device import load_device, open_host
from vlmedge.device_bench.hosts.host import Host
from vlmedge.device_bench.journal import opened
from vlmedge.device_bench.models import look
from vlmedge.device_bench.plan import Options, Place, Plan, make_plan, runs_original
from vlmedge.device_bench.report import csv_text, markdown, page
from vlmedge.device_bench.report.summary import summarise
from vlmedge.device_bench.result import Record
from vlmedge.device_bench.runner import TIMEOUT, run
from vlmedge.device_bench.scenario import load_scenario
from vlmedge.errors import UsageError
from vlmedge.loading import SourceLike
from vlmedge.progress import Progress
from vlmedge.staging import write_text

LOCAL: Final = "local"
STANDARD: Final = "standard"


@dataclass(frozen=True, slots=True)
class BenchResult:
    """What a run left: its folder (records.jsonl, report.html, report.md, report.csv) and all its records."""

    folder: Path
    records: tuple[Record, ...]


def bench(
    sources: Sequence[SourceLike],
    *,
    original: SourceLike | None = None,
    devices: Sequence[str] = (LOCAL,),
    scenario: str = STANDARD,
    runtime: str | None = None,
    units: Sequence[str] = (),
    threads: int | None = None,
    memory: Literal["fast", "lean"] = "fast",
    context: int | None = None,
    affinity: Sequence[int] = (),
    rounds: int | None = None,
    repeat: int | None = None,
    min_seconds: float | None = None,
    tokens: int | None = None,
    timeout: float = TIMEOUT,
    tune: bool = False,
    sustained: float | None = None,
    out: SourceLike | None = None,
    ray: str | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> BenchResult:
    """Measure bundles and checkpoints on devices, and write records and reports into the folder `out`.

    `original`: a checkpoint that runs in its own type and in float32, and whose float32 answers are the truth of every
    row. `devices`: see `device.load_device`; `scenario`: see `scenario.load_scenario`; `rounds`, `repeat`,
    `min_seconds` and `tokens` replace its numbers. `units`: what shall compute, by default everything that is there.
    `affinity`: the processors that models may use, () for all; `threads`: by default as many as these, else the
    device's, else the physical cores; `tune` finds the best for each variant first. `memory` and `context`: as in
    `loading.load`. `sustained`: minutes of each variant without a pause, after the rounds. `timeout`: seconds of one
    job. `ray`: the address of a cluster, whose nodes are the devices.

    The same call with the same `out` goes on where it was stopped. Raises UsageError for what cannot be meant,
    OutputError for a folder that cannot be written or holds another run, RuntimeFailedError for a device that cannot be
    reached, and what `subject.examine` raises; whatever happens to a job is in its record.
    """
    progress = progress or Progress()
    _check(devices, ray, timeout, sustained, threads)
    if tune and threads is not None:
        raise UsageError("threads are either given or tuned; leave out --threads or --tune threads")
    wanted = load_scenario(scenario).changed(rounds=rounds, repeat=repeat, min_seconds=min_seconds, tokens=tokens)
    first = os.fspath(original) if original is not None else None
    models = look([os.fspath(source) for source in sources], first, allow_pickle=allow_pickle, progress=progress)
    options = Options(
        runtime, tuple(units), threads or len(affinity) or None, memory, context, tuple(affinity), allow_pickle
    )
    with _opened(devices, ray, first is not None, progress) as (hosts, places, here):
        plan = make_plan(models, places, wanted, options, tune=tune, minutes=sustained or 0.0, here=here)
        if first is not None and plan.reference is None:
            progress.note("PyTorch is nowhere installed: nothing is compared with the original (extra 'torch')")
        folder = Path(out) if out is not None else Path(f"bench-{plan.digest[:8]}")
        records = _run(plan, hosts, folder, timeout, progress)
    return BenchResult(folder, records)


def write_reports(folder: Path, records: Sequence[Record]) -> None:
    """Write report.html, report.md and report.csv of at least one record. Raises OutputError where it cannot."""
    summary = summarise(records)
    write_text(folder / "report.html", page.render(summary, records))
    write_text(folder / "report.md", markdown.render(summary))
    write_text(folder / "report.csv", csv_text.render(summary))


def _run(plan: Plan, hosts: Mapping[str, Host], folder: Path, timeout: float, progress: Progress) -> tuple[Record, ...]:
    """The records of a run; a report of what there is is written also where it is stopped (Ctrl-C) or fails."""
    with opened(folder, plan.digest) as journal:
        try:
            run(plan, hosts, journal, folder, progress, timeout=timeout)
        finally:
            if journal.records:
                write_reports(folder, journal.records)
        return journal.records


@contextmanager
def _opened(
    devices: Sequence[str], ray: str | None, original: bool, progress: Progress
) -> Iterator[tuple[dict[str, Host], list[Place], Place | None]]:
    """The hosts, connected, by device; their places; and this machine's, where only it can run the original."""
    with ExitStack() as stack:
        hosts, places = {}, []
        for name, host, threads in _hosts(devices, ray, stack, progress):
            progress.stage(f"connecting to {name}")
            hosts[name] = host
            places.append(_place(name, host, threads, stack))
        here = None
        if original and LOCAL not in hosts and not any(map(runs_original, places)):
            hosts[LOCAL] = open_host(load_device(LOCAL))
            here = _place(LOCAL, hosts[LOCAL], None, stack)
        yield hosts, places, here


def _hosts(
    devices: Sequence[str], ray: str | None, stack: ExitStack, progress: Progress
) -> Iterator[tuple[str, Host, int | None]]:
    """(device, host, the threads that it is given)."""
    if ray is not None:
        from vlmedge.device_bench.hosts.ray import ray_hosts

        for host in stack.enter_context(ray_hosts(ray)):
            yield host.name, host, None
        return
    found = [load_device(word) for word in devices]
    names = [device.name for device in found]
    for word, device in zip(devices, found, strict=True):
        # two boards of one kind differ by their addresses
        yield word if names.count(device.name) > 1 else device.name, open_host(device, progress.note), device.threads


def _place(name: str, host: Host, threads: int | None, stack: ExitStack) -> Place:
    stack.callback(host.close)
    host.open()
    return Place(name, host.units(), threads)


def _check(
    devices: Sequence[str], ray: str | None, timeout: float, sustained: float | None, threads: int | None
) -> None:
    """What can be refused before anything is looked at."""
    if ray is not None and tuple(devices) != (LOCAL,):
        raise UsageError("a Ray cluster's nodes are the devices; leave out either --ray or --device")
    if not devices:
        raise UsageError("a benchmark needs at least one device")
    twice = next((name for name in devices if list(devices).count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"the device '{twice}' is named twice")
    for name, value in (("timeout", timeout), ("minutes of --sustained", sustained), ("threads", threads)):
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"the {name} must be more than 0, not {value:g}")
