"""Run one program on a phone under `android/measure.sh` and read what that wrote: output, memory, energy, its end."""

from __future__ import annotations

import re
import shlex
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from vlmedge.device_bench.hosts.adb_bridge import Phone, PhoneLostError, last_line
from vlmedge.device_bench.hosts.host import Output
from vlmedge.device_bench.outcome import signal_name, told_memory
from vlmedge.device_bench.result import Energy, Memory, Status
from vlmedge.errors import RuntimeFailedError

MEASURE = Path(__file__).parent.parent / "android" / "measure.sh"
COUNTER = "battery current x voltage, read every 0.2 s"
_GRACE = 30.0  # seconds that the phone gets to end a program itself
_SIGKILL = 137


class ProgramError(RuntimeFailedError):
    """A program that did not do what it was run for; `status` is the reply's."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status: Status = status


@dataclass(frozen=True, slots=True)
class Watch:
    """One look at a running program. `at`: seconds since the phone started; memory in kB; `watts` at the battery.

    What the phone does not let adb's user read is None.
    """

    at: float
    peak: int | None
    anonymous: int | None
    mapped: int | None
    watts: float | None
    charging: str


@dataclass(frozen=True, slots=True)
class Ran:
    """A program that ended well: what it printed, and what was seen of it. `files`: what else it wrote into `run`."""

    stdout: str
    stderr: str
    watched: tuple[Watch, ...]
    files: Mapping[str, str]

    @property
    def peak_mb(self) -> float | None:
        """The most that was ever resident, in MB (10^6 bytes)."""
        return max((watch.peak * 1024 / 1e6 for watch in self.watched if watch.peak is not None), default=None)

    @property
    def memory(self) -> Memory:
        """As a reply has it: the peak, and what was anonymous and mapped when it was last seen."""
        last = next((watch for watch in reversed(self.watched) if watch.anonymous is not None), None)
        anonymous = None if last is None or last.anonymous is None else last.anonymous * 1024 / 1e6
        mapped = None if last is None or last.mapped is None else last.mapped * 1024 / 1e6
        return Memory(None, None, self.peak_mb, anonymous, mapped, None)


class Runner:
    """Runs programs on one phone, each in a folder of its own below `folder`/runs.

    `timeout`: seconds for all of them, from when the first begins. `affinity`: the processors that they may use, () for
    all.
    """

    def __init__(self, phone: Phone, folder: str, timeout: float, affinity: Sequence[int] = ()) -> None:
        self._phone, self._folder, self._timeout = phone, folder, timeout
        self._bound = ("taskset", f"{sum(1 << number for number in set(affinity)):x}") if affinity else ()
        self._until: float | None = None
        self._count = 0
        self.ran: list[Ran] = []

    def run(self, program: Sequence[str], environment: Mapping[str, str], keep: Sequence[str] = ()) -> Ran:
        """Run it to its end; "{run}/" before an argument is the run's folder, `keep` names files there to be read.

        Raises ProgramError where it fails, crashes, hangs or gets no memory, PhoneLostError where the phone goes.
        """
        self._count += 1
        run, name = f"{self._folder}/runs/{self._count}", Path(program[0]).name
        if self._until is None:
            self._until = time.monotonic() + self._timeout
        left = self._until - time.monotonic()
        if left < 1:
            raise ProgramError("hung", f"the {self._timeout:.0f} s were over before {name} could be run")
        variables = [f"{key}={value}" for key, value in environment.items()]
        places = (f"{run}{word.removeprefix('{run}')}" if word.startswith("{run}/") else word for word in program)
        words = ["env", *variables, *self._bound, *places]
        command = shlex.join(["exec", "sh", f"{self._folder}/measure.sh", run, str(int(left)), *words])
        ended = False
        try:
            done = self._phone.watch(command, left + _GRACE)
            ended = done.code is not None
            self.ran.append(self._read(run, name, done, keep))
        finally:
            if not ended:
                self._end(run)
        return self.ran[-1]

    def clean(self) -> None:
        """Remove what the programs wrote."""
        with suppress(PhoneLostError):
            self._phone.shell("rm", "-rf", f"{self._folder}/runs")

    def energy(self) -> Energy:
        """Of all programs, their loading included: answers are not told apart."""
        return energy_of([ran.watched for ran in self.ran])

    def _read(self, run: str, name: str, done: Output, keep: Sequence[str]) -> Ran:
        """What the run left; that is whole where the program ended, even if adb did not hear of it."""
        if done.code is None:
            self._phone.check()
        found = self._pulled(run)
        if done.code is None and "code" not in found:
            raise ProgramError("hung", f"{name} did not end on the phone in {self._timeout:.0f} s")
        if not found:
            raise ProgramError("failed", f"{name} could not be started: {last_line(done)}")
        output = Output(_code(found), found.get("out", ""), found.get("err", ""))
        verdict = judge(name, output, hung="hung" in found, timeout=self._timeout)
        if verdict is not None:
            raise verdict
        files = {key: text for key, text in found.items() if any(key.startswith(prefix) for prefix in keep)}
        return Ran(output.stdout, output.stderr, read_samples(found.get("samples", "")), files)

    def _pulled(self, run: str) -> dict[str, str]:
        """The files of a run by name, none where it has no folder."""
        with tempfile.TemporaryDirectory() as here:
            try:
                self._phone.pull(run, Path(here))
            except PhoneLostError:
                raise
            except RuntimeFailedError:
                return {}
            return {path.name: path.read_text("utf-8", "replace") for path in Path(here).rglob("*") if path.is_file()}

    def _end(self, run: str) -> None:
        """Nothing goes on running there after an interruption."""
        where = shlex.quote(f"{run}/pid")
        with suppress(PhoneLostError):  # measure.sh ends it when the connection is lost, or its time is over
            self._phone.script(f"[ -f {where} ] && kill -9 $(cat {where})")


def judge(name: str, done: Output, *, hung: bool, timeout: float) -> ProgramError | None:
    """What a program's end means, None where it ended well. A shell adds 128 to the signal that ended it."""
    said = last_line(done)
    if hung:
        return ProgramError("hung", f"{name} was ended on the phone: {timeout:.0f} s were over")
    if done.code == 0:
        return None
    if done.code is None:
        return ProgramError("crashed", f"{name} and the shell that watched it were ended on the phone")
    if memory := told_memory(done.stdout) or told_memory(done.stderr):
        return ProgramError("out_of_memory", f"{name} got no memory on the phone: {memory}")
    if done.code == _SIGKILL:
        return ProgramError("out_of_memory", f"{name} was killed on the phone, as Android does where memory is short")
    if 128 < done.code < 193:
        how = signal_name(done.code - 128)
        return ProgramError("crashed", f"{name} crashed on the phone: {how}; {said}".rstrip("; "))
    if done.code in (126, 127):
        return ProgramError("failed", f"{name} cannot be run on the phone: {said}; is it built for Android and arm64?")
    return ProgramError("failed", f"{name} failed on the phone with the code {done.code}: {said}")


def read_samples(text: str) -> tuple[Watch, ...]:
    """What measure.sh noted; a line that was cut is left out."""
    rows = (line.split() for line in text.splitlines())
    return tuple(_watch(row) for row in rows if len(row) == 7)


def energy_of(runs: Sequence[Sequence[Watch]]) -> Energy:
    """Joules at the battery over several programs, each summed by trapezoids between looks.

    A charging battery's current is what the cable gives, so it says nothing of the program: that is a reason, not zero.
    """
    seconds = sum(run[-1].at - run[0].at for run in runs if run)
    looks = [watch for run in runs for watch in run]
    charging = {watch.charging for watch in looks} - {"Discharging", "-"}
    if not any(len(run) > 1 for run in runs):
        return Energy(None, None, seconds, "", "the programs were over before the battery could be read twice")
    if any(watch.watts is None for watch in looks):
        return Energy(None, None, seconds, "", "the battery's current cannot be read by adb's user on this phone")
    if charging or any(watch.charging == "-" for watch in looks):
        why = (
            "the phone hangs on its cable, so the battery's current is not the program's; use 'adb connect' without it"
        )
        return Energy(None, None, seconds, "", why)
    pairs = [pair for run in runs for pair in pairwise(run)]
    joules = sum((b.at - a.at) * ((a.watts or 0.0) + (b.watts or 0.0)) / 2 for a, b in pairs)
    return Energy(joules, None, seconds, f"{COUNTER}; whole programs, loading included")


def _watch(row: list[str]) -> Watch:
    at, peak, anonymous, mapped, current, voltage, charging = row
    amperes, volts = _number(current), _number(voltage)
    # Makers disagree whether a current that leaves the battery is negative.
    watts = None if amperes is None or volts is None else abs(amperes) * volts / 1e12
    return Watch(float(at), _number(peak), _number(anonymous), _number(mapped), watts, charging)


def _number(word: str) -> int | None:
    return int(word) if re.fullmatch(r"-?\d+", word) else None


def _code(found: Mapping[str, str]) -> int | None:
    word = found.get("code", "").strip()
    return int(word) if word.isdigit() else None
