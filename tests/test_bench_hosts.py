"""A job's process on this machine: whatever it does, there is a reply that says what happened, and nothing is left."""

import json
import signal
import subprocess
import sys
import time

import pytest

from tests.bench_hosts import alive, check_reply, gone, real_job, wait_for
from vlmedge.device_bench.device import Device
from vlmedge.device_bench.hosts import guard, process
from vlmedge.device_bench.hosts.files import parcels, renamed
from vlmedge.device_bench.hosts.host import Output
from vlmedge.device_bench.hosts.local import LocalHost
from vlmedge.device_bench.hosts.process import run_process
from vlmedge.device_bench.job import Ask, Job, Variant, Work
from vlmedge.device_bench.outcome import read_reply, read_units
from vlmedge.device_bench.result import Reply, Sample
from vlmedge.errors import RuntimeFailedError, UsageError
from vlmedge.loading import local_folder
from vlmedge.records import encode

JOB = Job("anchor", "here", Work("fake", (), 1), threads=1)
REPLY = json.dumps(encode(Reply("ok", samples=(Sample("a", 0.5, {"vision": 1.5}, (1.0, 2.0)),))))
READ = "import json, sys, os, signal; job = json.loads(sys.stdin.read()); "


@pytest.fixture
def host():
    """This machine with a worker of a few lines; what it says is in `reply`."""

    def made(text, timeout=20.0):
        return LocalHost(Device("here", "here", "local"), (sys.executable, "-c", READ + text)).run(JOB, timeout)

    return made


def test_a_reply_after_noise(host):
    reply = host(f"print('hello'); print(job['kind'], file=sys.stderr); print('{{}}'); print({REPLY!r})")
    assert reply == Reply("ok", samples=(Sample("a", 0.5, {"vision": 1.5}, (1.0, 2.0)),))


@pytest.mark.parametrize(
    ("text", "status", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "crashed", "it was ended by SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "out_of_memory", "most likely for memory"),
        ("print('a disk is full', file=sys.stderr); sys.exit(3)", "crashed", "ended with the code 3: a disk is full"),
        ("sys.exit(255)", "crashed", "it ended with the code 254"),
        ("import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 28, 1 << 28)); bytearray(1 << 30)",
         "out_of_memory", "it ran out of memory: MemoryError"),
        ("print('a\\x1b[31m b' + 'c' * 999)", "rubbish", "its last line is not JSON: a [31m bccc"),
        ("print('{\"status\": \"fine\"}')", "rubbish", "the reply.status is 'fine'"),
        ("print('[' * 100000)", "rubbish", "its last line is not JSON: [[["),
        ("pass", "rubbish", "it printed nothing"),
    ],
)  # fmt: skip
def test_how_a_worker_can_fail(host, text, status, reason):
    reply = host(text)
    assert (reply.status, reason in reply.reason) == (status, True), reply
    assert "\n" not in reply.reason
    assert reply.reason.isprintable()
    assert len(reply.reason) < 300


def test_a_crash_after_the_reply_costs_nothing(host):
    reply = host(f"print({REPLY!r}, flush=True); os.abort()")
    assert reply.status == "ok"
    assert reply.samples
    assert reply.reason == "after its reply it was ended by SIGABRT"


def test_a_worker_that_hangs_is_ended_with_what_it_started(host, tmp_path):
    note = tmp_path / "child"
    start = time.monotonic()
    reply = host(
        f"import subprocess as s; p = s.Popen(['sleep', '60']); open({str(note)!r}, 'w').write(str(p.pid)); p.wait()",
        1.5,
    )
    assert time.monotonic() - start < 10
    assert reply == Reply("hung", "it was ended because it took more than 1.5 s")
    assert gone(note.read_text())


def test_much_output_is_read_and_not_kept(host, monkeypatch):
    monkeypatch.setattr(process, "STDOUT", 1 << 20)
    text = f"[sys.stdout.write('x' * 9999 + chr(10)) for _ in range(10000)]; print(); print({REPLY!r})"
    assert host(text).status == "ok"
    output = run_process([sys.executable, "-c", "print('y' * (5 << 20))"], "", 20)
    assert 1 << 20 <= len(output.stdout) < 2 << 20


def test_a_worker_ends_with_the_process_that_asked(tmp_path):
    """Also where that is killed: the next run must not measure beside a forgotten worker."""
    note = tmp_path / "worker"
    worker = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    asking = (
        "import sys; from vlmedge.device_bench.hosts.process import run_guarded\n"
        f"run_guarded([sys.executable, '-c', {worker!r}], '', 60)"
    )
    for kill in (signal.SIGKILL, signal.SIGINT):
        note.unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "-c", asking], stderr=subprocess.DEVNULL)
        wait_for(lambda: note.exists() and note.read_text())
        assert alive(note.read_text())
        process.send_signal(kill)
        assert process.wait(20) != 0
        assert gone(note.read_text())


def test_a_guard_that_is_cut_off_ends_its_program_in_time(tmp_path):
    guarded = [sys.executable, "-I", guard.__file__, "0.5", "sleep", "60"]
    assert run_process(guarded, "\n", 20, hold=True).code == -signal.SIGKILL
    assert run_process([*guarded[:4], str(tmp_path / "none")], "\n", 20, hold=True).code == 127


def test_units():
    command = (sys.executable, "-c", 'print(\'x\'); print(\'{"torch": {"cpu": ""}}\')')
    host = LocalHost(Device("here", "here", "local"), command)
    assert host.units() == {"torch": {"cpu": ""}}
    with pytest.raises(RuntimeFailedError, match=r"^the worker does not tell its units: it ended with the code 1: no$"):
        read_units(Output(1, "", "no\n\n"), timeout=1)
    with pytest.raises(RuntimeFailedError, match="must be a string"):
        read_units(Output(0, '{"torch": {"cpu": 1}}', ""), timeout=1)


@pytest.mark.parametrize(
    ("code", "stderr", "reason"),
    [
        (0xC0000005, "", "it ended with an access violation (0xC0000005)"),
        (137, "", "it was killed by the system (SIGKILL), most likely for memory"),
        (134, "terminate called after throwing 'std::bad_alloc'\n", "it ran out of memory: terminate called after"),
        (-64, "", "it was ended by"),
        (None, "", "it was ended because it took more than 2 s"),
    ],
)
def test_endings_of_other_systems(code, stderr, reason):
    assert read_reply(Output(code, "", stderr), timeout=2).reason.startswith(reason)


def test_the_files_of_a_job(bundle, photo, tmp_path, monkeypatch):
    folder = tmp_path / "it's a model"
    folder.symlink_to(bundle)
    (tmp_path / "truth.json").write_text("{}")
    variant = Variant("m", str(folder), "d1", "gguf", "q8", 1, 8.0, "llamacpp")
    ask = Ask("photo", str(photo), "ab", 1, 1, "")
    job = Job("measure", "here", Work("w", (ask,), 1), variant=variant, truth=str(tmp_path / "truth.json"))
    model, picture, truth = parcels(job)
    assert (model.key, model.top) == ("d1", "it's a model")
    assert {file.name for file in model.files} == {
        f"it's a model/{path.relative_to(bundle).as_posix()}" for path in bundle.rglob("*") if path.is_file()
    }
    assert (picture.key, picture.files[0].sha256, truth.top) == ("ab", "ab", "truth.json")
    moved = renamed(job, {str(folder): "/far/m", str(photo): "/far/p", job.truth: "/far/t"})
    assert (moved.variant.source, moved.work.asks[0].picture, moved.truth) == ("/far/m", "/far/p", "/far/t")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moondream2").mkdir()
    (tmp_path / "moondream2/config.json").touch()
    for name in ("demo:moondream2", "moondream2", "vikhyatk/moondream2"):  # names, whatever lies there
        assert local_folder(name) is None
    with pytest.raises(UsageError, match="there is no file"):
        list(parcels(renamed(job, {str(photo): str(tmp_path / "none.png")})))


def test_links_to_folders_are_not_followed(tmp_path):
    model, blob = tmp_path / "model", tmp_path / "blob"
    (model / "onnx").mkdir(parents=True)
    blob.write_bytes(b"weights")
    (model / "onnx/w.onnx").symlink_to(blob)  # as the hub's cache has it
    (model / "onnx/loop").symlink_to(model)
    variant = Variant("m", str(model), "d1", "onnx", "f32", 1, 32.0, "onnxruntime")
    (found,) = parcels(Job("measure", "here", Work("w", (), 1), variant=variant))
    assert [file.name for file in found.files] == ["model/onnx/w.onnx"]


def test_the_worker_itself(bundle, photo):
    host = LocalHost(Device("here", "here", "local"))
    assert host.units()["llamacpp"]["cpu"] == ""
    check_reply(host.run(real_job(bundle, photo), 60))
