"""One device's part of a run: tuning, rounds in alternating order between anchors, and the sustained curve."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from vlmedge.device_bench.anchors import Anchors
from vlmedge.device_bench.drift import EVERY
from vlmedge.device_bench.execution import Execution
from vlmedge.device_bench.job import Job, Variant
from vlmedge.device_bench.plan import Plan
from vlmedge.device_bench.result import Record
from vlmedge.device_bench.tuning import thread_counts, tuned, tuning_job
from vlmedge.progress import Progress

PATIENCE = 2  # failures in a row, after which a variant is given up


@dataclass(frozen=True, slots=True)
class Orders:
    """What all devices of a run share. `truth`: the file of `Job.truth`.

    `go_on` raises where the run has to end between two jobs.
    """

    plan: Plan
    execution: Execution
    progress: Progress
    truth: str
    go_on: Callable[[], None]


class DeviceRun:
    """Runs what the plan has for one device. What is on the disk already is not run again."""

    def __init__(self, orders: Orders, device: str) -> None:
        self._orders = orders
        self._device = device
        self._variants = [seat.variant for seat in orders.plan.seats if seat.device == device]
        self._failures = {variant.label: 0 for variant in self._variants}  # in a row
        self._ready = False
        self._drift: float | None = None  # after jobs that were run again, to be looked at before the next one
        self._anchors = Anchors(device, orders.plan.scenario.name, orders.execution, orders.progress)

    def run(self) -> None:
        """All of it. Raises OutputError where a record cannot be written, and what `Orders.go_on` raises."""
        if self._orders.plan.tune:
            self._tune()
        self._measure()
        if self._orders.plan.minutes > 0:
            self._sustain()

    @property
    def left(self) -> int:
        """How many processes of the rounds are still to be run."""
        return sum(self._orders.execution.done(job) is None for job in self._all())

    def _measure(self) -> None:
        left, rounds = self.left, self._orders.plan.scenario.rounds
        if left:
            times = f"{rounds} round{'s' * (rounds > 1)}"
            self._orders.progress.stage(f"{times} of {len(self._variants)} on {self._device}", left)
        batch: list[Job] = []
        for job in self._wanted():
            self._do(job)
            batch.append(job)
            if len(batch) == EVERY:
                self._settle(batch)
                batch = []
        if batch:
            self._settle(batch)

    def _all(self) -> Iterator[Job]:
        """The rounds, forwards and backwards in turn: what a machine does over time meets all variants alike."""
        orders, work = self._orders, self._orders.plan.scenario.work
        for number in range(1, orders.plan.scenario.rounds + 1):
            for variant in self._variants if number % 2 else reversed(self._variants):
                yield Job("measure", self._device, work, number, variant, orders.truth, cold=number == 1)

    def _wanted(self) -> Iterator[Job]:
        """The jobs that are left, each decided when the one before it is done."""
        for job in self._all():
            done = self._orders.execution.done(job)
            if done is not None:
                self._judge(done)
            elif self._given_up(job.variant):
                self._orders.progress.advance(1)
            else:
                yield job

    def _do(self, job: Job, again: int = 0) -> None:
        assert job.variant is not None
        self._orders.go_on()
        if not again:
            self._prepare()
        threads = job.variant.threads
        record = self._orders.execution.do(job, tell=lambda _: self._anchors.of(threads), again=again)
        if not again:
            self._orders.progress.advance(1)
            if self._judge(record):
                reason = record.reply.reason or record.reply.status
                self._orders.progress.note(f"{job.variant.label} is given up on {self._device}: {reason}")

    def _prepare(self) -> None:
        """The first anchors before the first job; a rest where the machine needs one."""
        if not self._ready:
            self._ready = True
            self._anchors.begin(variant.threads for variant in self._variants)
        elif self._drift is not None:
            self._anchors.calm(self._drift)
        self._drift = None

    def _settle(self, batch: list[Job]) -> None:
        """The anchor after some jobs: where the machine had become slower, those that succeeded are run once more."""
        if not self._anchors.calm():
            return
        for job in batch:
            last = self._orders.execution.done(job)
            if last is not None and last.reply.status == "ok":
                self._do(job, last.again + 1)
        self._drift = self._anchors.measure()

    def _judge(self, record: Record) -> bool:
        """Count failures in a row; True where the variant is given up because of this one."""
        assert record.variant is not None
        label, status = record.variant.label, record.reply.status
        if status == "ok":
            self._failures[label] = 0
        else:
            self._failures[label] += PATIENCE if status == "unavailable" else 1
        return self._failures[label] >= PATIENCE

    def _given_up(self, variant: Variant | None) -> bool:
        return variant is not None and self._failures[variant.label] >= PATIENCE

    def _tune(self) -> None:
        """Give every variant the number of threads that is best for it."""
        execution, progress = self._orders.execution, self._orders.progress
        jobs = [job for job in self._tuning_jobs() if execution.done(job) is None]
        if jobs:
            progress.stage(f"tuning threads on {self._device}", len(jobs))
        for job in jobs:
            self._orders.go_on()
            execution.do(job)
            progress.advance(1)
        found = {t.label: t.chosen for t in tuned(execution.journal.records) if t.device == self._device}
        self._variants = [replace(v, threads=found.get(v.label, v.threads)) for v in self._variants]

    def _tuning_jobs(self) -> Iterator[Job]:
        variants = [variant for variant in self._variants if variant.on_processor]
        anchor = self._anchors.record(None) if variants else None
        if anchor is None:
            if variants:
                self._orders.progress.note(f"{self._device} does not tell its processors; threads are not tuned there")
            return
        facts, ceiling = anchor.reply.environment, anchor.reply.ceiling
        allowed = facts.get("affinity")
        logical = len(allowed) if isinstance(allowed, list) and allowed else int(facts.get("cores") or 1)
        counts = thread_counts(logical, ceiling.threads if ceiling else None)
        for variant in variants:
            for threads in counts:
                yield tuning_job(self._device, variant, self._orders.plan.scenario.work, threads)

    def _sustain(self) -> None:
        """Each variant for minutes, after the machine has had time to rest."""
        orders, minutes = self._orders, self._orders.plan.minutes
        work = replace(orders.plan.scenario.work, minutes=minutes)
        jobs = [
            Job("sustain", self._device, work, 1, variant, orders.truth)
            for variant in self._variants
            if not self._given_up(variant)
        ]
        left = [job for job in jobs if orders.execution.done(job) is None]
        if left:
            orders.progress.stage(f"{minutes:g} minutes of each variant on {self._device}", len(left))
        for number, job in enumerate(left):
            if self._ready and number:
                self._drift = self._anchors.measure()
            self._do(job)
        if left:
            self._anchors.measure()
