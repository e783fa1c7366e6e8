"""How a benchmark runs: order, anchors, rests, failures, kills, tuning; on a host that answers from a script."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from vlmedge.device_bench import bench as bench_module
from vlmedge.device_bench.bench import bench
from vlmedge.device_bench.device import load_device, open_host
from vlmedge.device_bench.drift import Clock
from vlmedge.device_bench.execution import Execution
from vlmedge.device_bench.job import Ask, Job, Variant
from vlmedge.device_bench.journal import opened
from vlmedge.device_bench.models import look
from vlmedge.device_bench.plan import Absent, Place, Plan, Seat, make_plan
from vlmedge.device_bench.report.chosen import last_tries
from vlmedge.device_bench.report.load import read_records
from vlmedge.device_bench.report.summary import summarise
from vlmedge.device_bench.result import Ceiling, Costs, Counts, Reply, Sample
from vlmedge.device_bench.runner import _machines, run
from vlmedge.device_bench.scenario import Scenario, load_scenario
from vlmedge.device_bench.tuning import thread_counts, tuned
from vlmedge.errors import OutputError, RuntimeFailedError, UsageError
from vlmedge.progress import Progress

ASK = Ask("one", "/a.png", "0" * 64, 8, 8, "What?")
COSTS = Costs(1e9, 1e9, 1e8, 1e6)


def variant(label, unit="cpu", **changes):
    return Variant(label, f"/models/{label}", label * 4, "gguf", "q4", 1000, 4.5, "llamacpp", unit, **changes)


def plan_of(*labels, rounds=3, device="local", **changes):
    scenario = Scenario("tiny", "Tiny", (ASK,), 4, repeat=1, rounds=rounds)
    return Plan(scenario, tuple(Seat(device, variant(label)) for label in labels), **changes)


def answer(decode=10.0, **changes):
    ms = {"vision": 10.0, "prefill": 10.0, "first_token": 25.0, "decode": decode, "end_to_end": 25.0 + 3 * decode}
    return Reply(
        "ok",
        samples=(Sample("one", 0.0, ms, (decode,) * 3),),
        counts=(Counts("one", 2, 2, 10, 5, 4),),
        costs=COSTS,
        threads=2,
        **changes,
    )


@dataclass
class FakeHost:
    """Answers from a script; an hour of it is a moment."""

    name: str = "local"
    machine: str = ""
    rates: list = field(default_factory=list)  # of the anchors to come, then 100
    script: dict = field(default_factory=dict)  # label -> replies to come, then good ones
    jobs: list = field(default_factory=list)
    slept: list = field(default_factory=list)
    seconds: float = 0.0

    @property
    def clock(self):
        return Clock(lambda: self.seconds, self.slept.append)

    def open(self):
        pass

    def close(self):
        pass

    def units(self):
        return {"llamacpp": {"cpu": ""}, "torch": {"cpu": "no PyTorch"}}

    def run(self, job, timeout):
        self.jobs.append((job, timeout))
        self.seconds += 1
        if job.kind == "anchor":
            rate = self.rates.pop(0) if self.rates else 100.0
            threads = job.threads or 2
            return Reply("ok", ceiling=Ceiling(threads, rate, {"f32": 10 * rate}), environment={"cores": 4})
        if job.kind == "reference":
            return answer(environment={"truth": {"model": "x", "asks": []}, "cpu": "a fast one"})
        replies = self.script.get(job.variant.label, [])
        reply = replies.pop(0) if replies else answer()
        if isinstance(reply, BaseException):
            raise reply
        self.seconds += timeout * (reply.status == "hung")
        return reply

    @property
    def order(self):
        """What was run: labels, "*" for an anchor."""
        return [job.variant.label if job.variant else "*" for job, _ in self.jobs]


class Notes(Progress):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def go(tmp_path):
    """Run a plan on a fake host; returns the records and the notes."""

    def run_it(plan, host, **options):
        notes = Notes()
        hosts = dict.fromkeys(plan.devices, host) | options.pop("hosts", {})
        with opened(tmp_path, plan.digest) as journal:
            run(plan, hosts, journal, tmp_path, notes, clock=host.clock, **options)
        return read_records(tmp_path), notes.notes

    return run_it


def test_variants_take_turns_between_anchors(go):
    host = FakeHost()
    plan = plan_of("a", "b", "c")
    gpu = Seat("local", variant("d", "cuda"))
    plan = replace(
        plan, seats=(*plan.seats, gpu), absent=(Absent(Seat("local", variant("e", "metal")), "no Mac", False),)
    )
    records, notes = go(plan, host, timeout=7)
    assert "".join(host.order) == "*" + "abcd" + "*" + "dcba" + "*" + "abcd" + "*"
    assert notes == []
    assert {timeout for _, timeout in host.jobs} == {7}
    assert [job.cold for job, _ in host.jobs if job.variant] == [True] * 4 + [False] * 8
    absent, *rest = records
    assert (absent.reply.status, absent.reply.reason, absent.round) == ("unavailable", "no Mac", 0)
    measured = [record for record in rest if record.variant]
    assert {record.drift for record in measured} == {0.0}
    assert {record.run for record in records} == {plan.digest}
    for record in measured:
        if record.variant.unit == "cpu":
            # 101 MB in 10 ms of 100 GB/s; 2 GFLOP in 10 ms of 1000 GFLOP/s
            assert record.reached == pytest.approx({"vision": 0.2, "prefill": 0.1, "decode": 0.101})
            assert record.ceiling.bandwidth == 100
        else:
            assert (record.reached, record.ceiling) == ({}, None)


def test_the_original_answers_first(go, tmp_path):
    host = FakeHost()
    plan = plan_of("a", rounds=1, reference=Seat("local", variant("original f32")))
    records, _ = go(plan, host)
    first = records[0]
    assert (first.kind, first.reply.environment) == ("reference", {"cpu": "a fast one"})
    assert json.loads((tmp_path / "truth.json").read_text()) == {"model": "x", "asks": []}
    assert [job.truth for job, _ in host.jobs] == ["", "", str(tmp_path / "truth.json"), ""]
    for damage in (Path.unlink, lambda path: path.write_text("{")):
        damage(tmp_path / "truth.json")
        assert len(go(plan, host)[0]) == len(records) + 1  # asked again, and nothing else
        assert len(go(plan, host)[0]) == len(records) + 1
        records.append(records[0])


def test_an_original_that_fails_is_told_and_not_needed(go, tmp_path):
    host = FakeHost()
    host.run = lambda job, timeout: Reply("failed", "no such layer") if job.kind == "reference" else answer()
    records, notes = go(plan_of("a", rounds=1, reference=Seat("local", variant("original f32"))), host)
    assert notes[0] == "the original gave no answers, so nothing is compared with it: no such layer"
    assert [record.reply.status for record in records if record.kind == "measure"] == ["ok"]
    assert not (tmp_path / "truth.json").exists()


def test_a_machine_that_slows_down_rests_and_its_jobs_run_again(go):
    host = FakeHost(rates=[100, 85, 95, 99, 100])
    records, notes = go(plan_of("a", "b", rounds=3), host)
    assert "".join(host.order) == "*" + "abba" + "***" + "abba" + "*" + "ab" + "*"
    assert host.slept == [5, 10]
    assert len(notes) == 1
    assert "local is 15% slower than at the start; pausing" in notes[0]
    tries = [(r.variant.label, r.round, r.again) for r in records if r.variant]
    assert tries[4:8] == [("a", 1, 1), ("b", 1, 1), ("b", 2, 1), ("a", 2, 1)]
    assert [r.drift for r in records if not r.variant] == pytest.approx([0, 0.15, 0.05, 0.01, 0, 0], abs=0.006)


def test_a_machine_that_stays_slow_is_not_waited_for_for_ever(go):
    host = FakeHost(rates=[100] + [80] * 20)
    records, notes = go(plan_of("a", "b", rounds=4), host)
    assert host.slept == [5, 10, 20, 25]
    assert "still 20% slower; the run goes on" in notes[1]
    assert [r.again for r in records if r.variant] == [0] * 4 + [1] * 4 + [0] * 4
    assert [r.drift for r in records if r.variant and r.round > 2] == pytest.approx([0.2] * 4)


def test_failures_are_rows_and_two_in_a_row_end_a_variant(go):
    crash, hung = Reply("crashed", "ended by SIGSEGV"), Reply("hung", "took 600 s")
    script = {
        "a": [crash, answer(), hung, Reply("out_of_memory")],
        "b": [crash, hung],
        "c": [Reply("unavailable", "no GPU")],
        "d": [RuntimeFailedError("no process can be started here"), Reply("lost", "gone"), answer()],
    }
    host = FakeHost(script=script)
    records, notes = go(plan_of("a", "b", "c", "d", rounds=5), host)
    found = {}
    for record in records:
        if record.variant:
            found.setdefault(record.variant.label, []).append(record.reply.status)
    assert found == {
        "a": ["crashed", "ok", "hung", "out_of_memory"],
        "b": ["crashed", "hung"],
        "c": ["unavailable"],
        "d": ["failed", "lost"],
    }
    assert "b is given up on local: took 600 s" in notes
    assert "c is given up on local: no GPU" in notes
    before = len(host.jobs)
    script["d"] = []
    again, _ = go(plan_of("a", "b", "c", "d", rounds=5), host)
    assert [job.variant.label for job, _ in host.jobs[before:] if job.variant] == ["d"] * 4  # what was lost, and on
    assert [r.reply.status for r in again if r.variant and r.variant.label == "d"] == ["failed", "lost", *["ok"] * 4]


def test_what_hung_is_tried_again_where_it_has_more_time(go):
    hung = Reply("hung", "took too long")
    host = FakeHost(script={"a": [hung, hung]})
    plan = plan_of("a", rounds=3)
    assert [r.reply.status for r in go(plan, host, timeout=9)[0] if r.variant] == ["hung"] * 2
    before = len(host.jobs)
    go(plan, host, timeout=9)
    assert len(host.jobs) == before
    records, _ = go(plan, host, timeout=90)
    assert [r.reply.status for r in last_tries(records) if r.variant] == ["ok"] * 3
    patient = replace(plan, scenario=plan.scenario.changed(min_seconds=50))
    execution = Execution({}, None, 9)
    assert [execution.limit(Job("measure", "local", p.scenario.work)) for p in (plan, patient)] == [9, 59]


def test_a_run_that_was_moved_goes_on(go, tmp_path):
    """Where models, pictures and the truth lie is no difference between jobs."""
    plan = plan_of("a", "b", rounds=1, reference=Seat("local", variant("original f32")))
    host = FakeHost()
    records, _ = go(plan, host)
    seats = tuple(replace(s, variant=replace(s.variant, source=f"/elsewhere/{s.variant.label}")) for s in plan.seats)
    asks = tuple(replace(ask, picture="/elsewhere/b.png") for ask in plan.scenario.asks)
    moved = replace(plan, seats=seats, scenario=replace(plan.scenario, asks=asks))
    folder = tmp_path / "moved"
    folder.mkdir()
    for name in ("records.jsonl", "truth.json"):
        (tmp_path / name).rename(folder / name)
    with opened(folder, moved.digest) as journal:
        run(moved, {"local": host}, journal, folder, clock=host.clock)
    assert len(read_records(folder)) == len(records)
    job = Job("measure", "local", plan.scenario.work, variant=variant("a"))
    assert len({j.id for j in (job, replace(job, truth="/t"), replace(job, cold=True), replace(job, round=2))}) == 4


def test_a_stopped_run_goes_on(go, tmp_path):
    host = FakeHost(script={"b": [answer(), KeyboardInterrupt()]})
    plan = plan_of("a", "b", rounds=3)
    with pytest.raises(KeyboardInterrupt):
        go(plan, host)
    kept = (tmp_path / "records.jsonl").read_bytes()
    with (tmp_path / "records.jsonl").open("ab") as file:
        file.write(b'{"kind": "measure", "schema": "vlm')  # what a kill in the middle of a write leaves
    records, _ = go(plan, host)
    assert (tmp_path / "records.jsonl").read_bytes().startswith(kept)
    jobs = [r.job for r in records if r.variant]
    assert len(jobs) == len(set(jobs)) == 6
    assert "".join(host.order) == "*abb" + "*baab" + "*"[:0] + "*"
    assert len(go(plan, host)[0]) == len(records)  # nothing is left, so nothing is run: no anchor either
    more = go(replace(plan, scenario=plan.scenario.changed(rounds=4)), host)[0]
    assert [(r.variant.label, r.round) for r in more[len(records) :] if r.variant] == [("b", 4), ("a", 4)]


def test_a_killed_run_goes_on(tmp_path):
    """SIGKILL in the middle of a real process; what it had written is what the next one does not do again."""
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "import test_bench_runner as t\n"
        "class Slow(t.FakeHost):\n"
        "    def run(self, job, timeout):\n"
        "        time.sleep(0.02)\n"
        "        return super().run(job, timeout)\n"
        "plan = t.plan_of('a', 'b', rounds=100)\n"
        "with t.opened(Path(sys.argv[2]), plan.digest) as journal:\n"
        "    t.run(plan, {'local': Slow()}, journal, Path(sys.argv[2]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)])
    file = tmp_path / "records.jsonl"
    deadline = time.monotonic() + 60
    while not (file.exists() and file.read_bytes().count(b"\n") >= 12):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = [r.job for r in read_records(tmp_path) if r.variant]
    plan, host = plan_of("a", "b", rounds=100), FakeHost()
    with opened(tmp_path, plan.digest) as journal:
        run(plan, {"local": host}, journal, tmp_path, clock=host.clock)
    jobs = [r.job for r in read_records(tmp_path) if r.variant]
    assert jobs[: len(before)] == before
    assert len(jobs) == len(set(jobs)) == 200


def test_a_folder_belongs_to_one_run_and_one_process(tmp_path, go, monkeypatch):
    go(plan_of("a", rounds=1), FakeHost())
    with pytest.raises(OutputError, match="holds another run"), opened(tmp_path, "other"):
        pass
    digest = plan_of("a", rounds=1).digest
    with (
        opened(tmp_path, digest) as journal,
        pytest.raises(OutputError, match="another benchmark is writing"),
        opened(tmp_path, digest),
    ):
        pass
    before = (tmp_path / "records.jsonl").read_bytes()
    journal.add(journal.records[0])  # a thread that comes late
    assert (tmp_path / "records.jsonl").read_bytes() == before

    def full(fd, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with opened(tmp_path, digest) as journal:
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OutputError, match="is full; free some space: the records so far are kept"):
            journal.add(journal.records[0])
        monkeypatch.undo()
    write = os.write

    def half(fd, data):
        monkeypatch.setattr(os, "write", full)  # the disk is full in the middle of a line
        return write(fd, data[: len(data) // 2])

    with opened(tmp_path, digest) as journal:
        monkeypatch.setattr(os, "write", half)
        with pytest.raises(OutputError, match="is full"):
            journal.add(journal.records[0])
        monkeypatch.undo()
        assert (tmp_path / "records.jsonl").read_bytes() == before
    (tmp_path / "records.jsonl").write_bytes(b"{}\n" + before)
    with pytest.raises(UsageError, match="line 1 has no schema"), opened(tmp_path, digest):
        pass


def test_threads_are_tuned_for_each_variant(go):
    best = {"a": 4, "b": 2}

    class Host(FakeHost):
        def run(self, job, timeout):
            reply = super().run(job, timeout)
            if job.kind != "measure":
                return reply
            off = abs(job.variant.threads - best[job.variant.label[0]])
            return answer(10.0 + off)

    host = Host()
    plan = plan_of("a", "b", rounds=1, tune=True)
    records, _ = go(plan, host)
    found = tuned(records)
    assert [(t.label, t.chosen, sorted(t.curve)) for t in found] == [("a", 4, [1, 2, 4]), ("b", 2, [1, 2, 4])]
    assert found[0].best == {"vision": 1, "prefill": 1, "decode": 4}  # the first two do not care: the fewest
    assert host.order[1:7] == [f"{v} ({n})" for v in "ab" for n in ("1 thread", "2 threads", "4 threads")]
    rows = [(r.variant.label, r.variant.threads) for r in records if r.variant and r.round == 1]
    assert rows == [("a", 4), ("b", 2)]
    assert [job.threads for job, _ in host.jobs if job.kind == "anchor"] == [None, 4, 2, 4, 2]
    assert len(go(plan, host)[0]) == len(records)
    assert thread_counts(12, 6) == (1, 2, 4, 6, 8, 12)


def test_a_sustained_run_shows_that_the_ranking_changes(go):
    def minutes(*rates):
        ms = [{"decode": 1000 / rate, "first_token": 5.0, "end_to_end": 9.0} for rate in rates]
        return Reply("ok", samples=tuple(Sample("one", 60.0 * i + 1, m) for i, m in enumerate(ms)))

    host = FakeHost(script={"a": [answer(), minutes(50, 40, 20)], "b": [answer(), minutes(30, 30, 30)]})
    records, _ = go(plan_of("a", "b", rounds=1, minutes=3.0), host, timeout=10)
    assert [(job.work.minutes, timeout) for job, timeout in host.jobs if job.kind == "sustain"] == [(3.0, 190.0)] * 2
    summary = summarise(records)
    hot = summary.sustained[0]
    assert [(minute, round(value)) for minute, value in hot.curves["decode_rate"].points] == [(0, 50), (1, 40), (2, 20)]
    assert "The ranking changes under load on local: a, b at first, b, a at last." in summary.notes


def test_machines_work_at_the_same_time(go):
    hosts = {"pi": FakeHost("ssh pi@10.0.0.5", "pi"), "phone": FakeHost("adb 1234", "phone")}
    plan = plan_of("a", "b", rounds=2)
    seats = [replace(seat, device=device) for device in hosts for seat in plan.seats]
    records, _ = go(replace(plan, seats=tuple(seats)), FakeHost(), hosts=hosts)
    for device, host in hosts.items():
        assert "".join(host.order) == "*abba*"
        assert {r.host for r in records if r.device == device} == {host.name}
    words = ("local", "browser", "ssh:me@localhost", "ssh:pi@a.local", "ssh:pi@b.local", "adb:1234", "ssh:you@A.local")
    found = _machines(words, {word: open_host(load_device(word)) for word in words})
    assert found == [list(words[:3]), [words[3], words[6]], [words[4]], [words[5]]]
    hosts["phone"].run = None  # not even callable: an error of ours is raised here, not lost in a thread
    with pytest.raises(TypeError):
        go(replace(plan, seats=tuple(seats), scenario=plan.scenario.changed(rounds=3)), FakeHost(), hosts=hosts)


def test_bench_writes_its_reports_also_when_it_is_stopped(bundle, tmp_path, monkeypatch):
    host = FakeHost()
    host.script[bundle.name] = [answer(), KeyboardInterrupt()]
    monkeypatch.setattr(bench_module, "open_host", lambda device, tell=None: host)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        bench([bundle], scenario="quick", rounds=3, out=out)
    files = ["records.jsonl", "report.csv", "report.html", "report.md"]
    assert sorted(path.name for path in out.iterdir()) == files
    result = bench([bundle], scenario="quick", rounds=3, out=out)
    assert [r.round for r in result.records if r.variant] == [1, 2, 3]
    assert "golden.gguf" in (result.folder / "report.md").read_text()
    with pytest.raises(UsageError, match="threads are either given or tuned"):
        bench([bundle], threads=1, tune=True)
    with pytest.raises(UsageError, match="leave out either --ray or --device"):
        bench([bundle], ray="auto", devices=("pi",))


class Calm:
    """This machine, whose ceilings are told and not measured: the suite keeps it busy."""

    def __init__(self):
        self.host = open_host(load_device("local"))
        self.name, self.machine = self.host.name, self.host.machine

    def units(self):
        return self.host.units()

    def run(self, job: Job, timeout: float) -> Reply:
        return FakeHost().run(job, timeout) if job.kind == "anchor" else self.host.run(job, timeout)


@pytest.mark.slow
def test_real_workers(bundle, golden, tmp_path):
    """The original and a bundle of it, in processes of their own: all that a row needs is in its record."""
    host = Calm()
    place = Place("local", host.units(), 1)
    plan = make_plan(look([str(bundle)], str(golden)), [place], load_scenario("quick").changed(rounds=1, tokens=4))
    with opened(tmp_path, plan.digest) as journal:
        run(plan, {"local": host}, journal, tmp_path, timeout=120)
    records = [r for r in read_records(tmp_path) if r.kind == "measure" and r.round]
    assert [(r.variant.label, r.reply.status) for r in records] == [
        (label, "ok") for label in ("original bf16", "original f32", "golden.gguf")
    ]
    for record in records:
        agreement = record.reply.agreement
        assert agreement.tokens == 4
        assert record.variant.label == "original bf16" or agreement.same_answers == 1
        assert {"vision", "prefill", "decode"} <= record.reached.keys()
        assert record.reply.memory.peak > record.reply.memory.baseline
