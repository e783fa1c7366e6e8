"""A device's anchors: its ceilings measured again and again through a run, and the pauses when they sink."""

from __future__ import annotations

from collections.abc import Iterable

from vlmedge.device_bench.drift import FAR, NEAR, Baseline, rest
from vlmedge.device_bench.execution import Execution, State
from vlmedge.device_bench.job import Job, Work
from vlmedge.device_bench.result import Record, Reply
from vlmedge.progress import Progress


class Anchors:
    """Of one device, for each number of threads that its jobs take. What stays slow is not waited for again."""

    def __init__(self, device: str, scenario: str, execution: Execution, progress: Progress) -> None:
        self._device = device
        self._work = Work(scenario, (), 0)
        self._execution = execution
        self._progress = progress
        self._baselines: dict[int | None, Baseline] = {}  # by the threads that were asked for
        self._states: dict[int | None, State] = {}
        self._mute: set[int | None] = set()
        self._slow = False

    def begin(self, threads: Iterable[int | None]) -> None:
        """Measure for these numbers of threads from now on; a run that goes on is held against its own beginning."""
        self._baselines.clear()
        for number in dict.fromkeys(threads):
            self._baselines[number] = baseline = Baseline()
            for record in self._execution.journal.of(self._job(number)):
                if record.reply.ceiling is not None:
                    baseline.drift(record.reply.ceiling)
        self.calm()

    def record(self, threads: int | None) -> Record | None:
        """An anchor with so many threads, in whatever session; it is measured where there is none yet."""
        found = self._execution.journal.of(self._job(threads))
        if not any(record.reply.ceiling for record in found):
            self.begin([threads])
            found = self._execution.journal.of(self._job(threads))
        return next((record for record in found if record.reply.ceiling is not None), None)

    def of(self, threads: int | None) -> State:
        """The state at the last anchor."""
        return self._states.get(threads, State())

    def calm(self, drift: float | None = None) -> bool:
        """Measure (or take a `drift` just measured); let a machine rest that is more than 10 % slower.

        True where it had to; one that stayed slow the last time does not.
        """
        drift = self.measure() if drift is None else drift
        if drift is None or drift <= FAR:
            self._slow = False
            return False
        if self._slow:
            return False
        self._progress.note(f"{self._device} is {drift:.0%} slower than at the start; pausing until it has recovered")
        after = rest(self.measure, self._execution.clock)
        self._slow = after is not None and after > FAR
        if after is not None and after > NEAR:
            self._progress.note(f"{self._device} is still {after:.0%} slower; the run goes on, and its records tell")
        return True

    def measure(self) -> float | None:
        """Measure all, and return the largest drift; None where nothing could be measured."""
        found = [self._anchor(threads) for threads in self._baselines if threads not in self._mute]
        return max((drift for drift in found if drift is not None), default=None)

    def _anchor(self, threads: int | None) -> float | None:
        record = self._execution.do(self._job(threads), tell=lambda reply: self._judged(threads, reply))
        if record.reply.ceiling is None:
            self._mute.add(threads)
            if record.reply.status != "unavailable":
                self._progress.note(f"the ceilings of {self._device} cannot be measured: {record.reply.reason}")
        return record.drift

    def _judged(self, threads: int | None, reply: Reply) -> State:
        if reply.ceiling is None:
            return State()
        self._states[threads] = state = State(reply.ceiling, self._baselines[threads].drift(reply.ceiling))
        return state

    def _job(self, threads: int | None) -> Job:
        return Job("anchor", self._device, self._work, round=0, threads=threads)
