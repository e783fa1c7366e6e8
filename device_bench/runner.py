"""A plan carried out: what cannot run is noted, the original answers first, then the devices do their parts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread
from typing import Final

from vlmedge.device_bench.agreement import read_truth
from vlmedge.device_bench.device_run import DeviceRun, Orders
from vlmedge.device_bench.drift import Clock
from vlmedge.device_bench.execution import Execution, State, make_record
from vlmedge.device_bench.hosts.host import Host
from vlmedge.device_bench.job import Job
from vlmedge.device_bench.journal import Journal
from vlmedge.device_bench.plan import Plan
from vlmedge.device_bench.result import Record, Reply
from vlmedge.errors import VlmedgeError
from vlmedge.progress import Progress
from vlmedge.staging import write_text

TRUTH: Final = "truth.json"
TIMEOUT: Final = 600.0  # seconds of a job, unless the user says otherwise
_WAIT = 0.5  # seconds between two looks at threads: a wait without end hears no Ctrl-C on Windows


def run(
    plan: Plan,
    hosts: Mapping[str, Host],
    journal: Journal,
    folder: Path,
    progress: Progress | None = None,
    *,
    timeout: float = TIMEOUT,
    clock: Clock | None = None,
) -> None:
    """Do what is left of a plan; `hosts` are open, one per device name. What a job does wrong stands in its record.

    Devices that are machines of their own work at the same time. Raises OutputError where `folder` cannot be written.
    """
    progress = progress or Progress()
    execution = Execution(hosts, journal, timeout, clock or Clock())
    _note_absent(plan, execution)
    truth = _reference(plan, execution, folder, progress)
    stop = Event()
    orders = Orders(plan, execution, progress, truth, lambda: _check(stop))
    groups = _machines(plan.devices, hosts)
    if len(groups) == 1:
        _one_after_another(orders, groups[0])
    elif groups:
        _at_once(orders, groups, stop)


class _StoppedError(Exception):
    """Another device's part has ended the run."""


def _check(stop: Event) -> None:
    if stop.is_set():
        raise _StoppedError


def _note_absent(plan: Plan, execution: Execution) -> None:
    """A record for what cannot be run: round 1 where it was asked for, round 0 for a unit that is only listed."""
    started = datetime.now(UTC).isoformat(timespec="milliseconds")
    for absent in plan.absent:
        device, variant = absent.seat.device, absent.seat.variant
        job = Job("measure", device, plan.scenario.work, int(absent.asked), variant)
        if execution.done(job) is None:
            reply, host = Reply("unavailable", absent.reason), execution.hosts[device].name
            execution.journal.add(make_record(execution.journal.run, job, host, reply, started, 0.0, State()))


def _reference(plan: Plan, execution: Execution, folder: Path, progress: Progress) -> str:
    """The file with the original's answers, made where it is not there yet; "" where there is none."""
    if plan.reference is None:
        return ""
    path = Path(folder).absolute() / TRUTH
    work = replace(plan.scenario.work, warmup=0, repeat=1, min_seconds=0.0)
    job = Job("reference", plan.reference.device, work, 1, plan.reference.variant)
    record = execution.done(job)
    if record is None or (record.reply.status == "ok" and not _is_whole(path)):
        progress.stage("the original's answers in float32")
        record = execution.do(job, arrange=lambda reply: _kept(reply, path))
        _tell(record, progress)
    return str(path) if record.reply.status == "ok" else ""


def _is_whole(path: Path) -> bool:
    """Can the truth be read? Every job would fail for one that is damaged."""
    try:
        read_truth(path)
    except VlmedgeError:
        return False
    return True


def _kept(reply: Reply, path: Path) -> Reply:
    """Write the truth that a reply brings into its file; the record does without."""
    if reply.status != "ok":
        return reply
    truth = reply.environment.get("truth")
    if truth is None:
        return replace(reply, status="failed", reason="the original's worker did not tell its answers")
    write_text(path, json.dumps(truth, allow_nan=False) + "\n")
    return replace(reply, environment={key: value for key, value in reply.environment.items() if key != "truth"})


def _tell(record: Record, progress: Progress) -> None:
    if record.reply.status != "ok":
        why = record.reply.reason or record.reply.status
        progress.note(f"the original gave no answers, so nothing is compared with it: {why}")


def _machines(devices: Sequence[str], hosts: Mapping[str, Host]) -> list[list[str]]:
    """Devices by machine: those of one machine would disturb each other."""
    groups: dict[str, list[str]] = {}
    for device in devices:
        groups.setdefault(hosts[device].machine, []).append(device)
    return list(groups.values())


def _one_after_another(orders: Orders, devices: Sequence[str]) -> None:
    for device in devices:
        DeviceRun(orders, device).run()


def _at_once(orders: Orders, groups: Sequence[Sequence[str]], stop: Event) -> None:
    """One thread per machine. The first error ends the others after the job that they are at, and is raised."""
    errors: list[BaseException] = []
    shared = replace(orders, progress=_Shared(orders.progress))

    def work(devices: Sequence[str]) -> None:
        try:
            _one_after_another(shared, devices)
        except _StoppedError:
            pass
        except BaseException as error:  # whatever it is, it is raised where the run was called
            errors.append(error)
            stop.set()

    jobs = sum(DeviceRun(orders, device).left for devices in groups for device in devices)
    orders.progress.stage(f"{len(groups)} machines at work", jobs)
    threads = [Thread(target=work, args=(devices,), daemon=True) for devices in groups]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(_WAIT)
    finally:
        stop.set()
    if errors:
        raise errors[0]


class _Shared(Progress):
    """One bar for all machines: their own stages are not shown."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    @property
    def quiet(self) -> bool:
        """As the bar's."""
        return self._progress.quiet

    def advance(self, steps: int) -> None:
        """Move the bar."""
        self._progress.advance(steps)

    def note(self, text: str) -> None:
        """Pass it on."""
        self._progress.note(text)
