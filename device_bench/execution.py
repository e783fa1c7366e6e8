"""One job done and written down: the host's reply with what the runner knows about it, as a record on the disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from statistics import fmean, median
from typing import Final

from vlmedge.device_bench import costs
from vlmedge.device_bench.drift import Clock
from vlmedge.device_bench.hosts.host import Host
from vlmedge.device_bench.job import Job
from vlmedge.device_bench.journal import Journal
from vlmedge.device_bench.result import SCHEMA, Ceiling, Record, Reply
from vlmedge.errors import VlmedgeError

DONE: Final = frozenset(("ok", "unavailable", "failed", "crashed", "hung", "out_of_memory", "rubbish"))  # but "lost"


@dataclass(frozen=True, slots=True)
class State:
    """A machine's state around a job: its ceilings at the last anchor, and how much slower it was then."""

    ceiling: Ceiling | None = None
    drift: float | None = None


@dataclass(frozen=True, slots=True)
class Execution:
    """Does jobs on the hosts of their devices, and keeps the records. `timeout`: seconds of a job; see `limit`."""

    hosts: Mapping[str, Host]
    journal: Journal
    timeout: float
    clock: Clock = field(default_factory=Clock)

    def limit(self, job: Job) -> float:
        """Seconds that a job may take: those of every job, beside those that it is told to go on for."""
        return self.timeout + max(job.work.minutes * 60, job.work.min_seconds)

    def done(self, job: Job) -> Record | None:
        """The last record of a job that need not be done again: its host was not lost on it, its time is no longer."""
        found = (record for record in reversed(self.journal.of(job)) if record.reply.status in DONE)
        return next((r for r in found if r.reply.status != "hung" or r.seconds >= self.limit(job)), None)

    def do(
        self,
        job: Job,
        *,
        tell: Callable[[Reply], State] | None = None,
        again: int = 0,
        arrange: Callable[[Reply], Reply] | None = None,
    ) -> Record:
        """Run a job and record it. Whatever happens to it is in the record; only the disk can raise (OutputError).

        `tell` gives the machine's state that is recorded, `arrange` changes the reply before it is.
        """
        host, begin = self.hosts[job.device], self.clock.now()
        started = datetime.now(UTC).isoformat(timespec="milliseconds")
        reply = _reply(host, job, self.limit(job))
        seconds = round(self.clock.now() - begin, 3)
        if arrange is not None:
            reply = arrange(reply)
        state = tell(reply) if tell is not None else State()
        record = make_record(self.journal.run, job, host.name, reply, started, seconds, state, again)
        self.journal.add(record)
        return record


def make_record(
    run: str, job: Job, host: str, reply: Reply, started: str, seconds: float, state: State, again: int = 0
) -> Record:
    """What is written of a job; ceilings are those of the processor, they tell nothing about other units."""
    ceiling = state.ceiling if job.variant and job.variant.on_processor else None
    return Record(
        schema=SCHEMA,
        run=run,
        job=job.id,
        kind=job.kind,
        device=job.device,
        host=host,
        round=job.round,
        variant=job.variant,
        work=job.work,
        started=started,
        seconds=seconds,
        reply=reply,
        ceiling=ceiling,
        reached=reached(reply, ceiling),
        drift=state.drift,
        again=again,
    )


def reached(reply: Reply, ceiling: Ceiling | None) -> dict[str, float]:
    """Fractions of the ceiling by stage (`costs.reached`), from the reply's medians; {} where there is nothing."""
    if reply.costs is None or ceiling is None or not reply.samples:
        return {}
    crops = fmean(count.encoded_crops for count in reply.counts) if reply.counts else 0.0
    return costs.reached(medians(reply), crops, reply.costs, ceiling)


def medians(reply: Reply) -> dict[str, float]:
    """Stage -> ms: the mean over the asks of each one's median, so that every ask counts alike."""
    stages = dict.fromkeys(stage for sample in reply.samples for stage in sample.ms)
    asks = dict.fromkeys(sample.ask for sample in reply.samples)
    out = {}
    for stage in stages:
        found = [[s.ms[stage] for s in reply.samples if s.ask == ask and stage in s.ms] for ask in asks]
        out[stage] = fmean(median(values) for values in found if values)
    return out


def _reply(host: Host, job: Job, timeout: float) -> Reply:
    """The host's reply; where it cannot even begin, that is one too."""
    try:
        return host.run(job, timeout)
    except VlmedgeError as error:
        return Reply("failed", str(error))
