"""Phones over adb: a fake adb as a real process, with programs that print what llama.cpp's and ONNX Runtime's do."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.bench_hosts import wait_for
from vlmedge.bundle import open_bundle
from vlmedge.device_bench.device import load_device, open_host
from vlmedge.device_bench.hosts import adb_onnxruntime
from vlmedge.device_bench.hosts.adb_llamacpp import read_encoded, units_of
from vlmedge.device_bench.hosts.adb_run import MEASURE, ProgramError, Ran, energy_of, read_samples
from vlmedge.device_bench.hosts.adb_stages import tasks
from vlmedge.device_bench.job import Ask, Job, Variant, Work
from vlmedge.device_bench.result import Reply
from vlmedge.errors import RuntimeFailedError, UsageError
from vlmedge.records import decode, encode
from vlmedge.subject import fingerprint

FAKE = Path(__file__).parent / "fake_adb.py"
ROOT = "data/local/tmp/vlmedge"
# As tools/llama-bench/llama-bench.cpp prints (jsonl_printer, common_print_available_devices); 2 ms for every position.
LLAMA_BENCH = r"""#!/bin/sh
echo "$@" >>$FAKE_PHONE/benched
if [ "$1" = --list-devices ]; then
    printf 'Available devices:\n  Vulkan0: Adreno (TM) 750 (5500 MiB, 5400 MiB free)\n'
    exit 0
fi
depth=0 threads=4 gpu=
while [ $# -gt 0 ]; do
    case $1 in
        -p) prompt=$2 ;; -n) new=$2 ;; -d) depth=$2 ;; -r) repeat=$2 ;; -t) threads=$2 ;; -dev) device=$2 ;;
    esac
    shift
done
[ $device = none ] || gpu=$(cat $FAKE_PHONE/gpu)
case $(cat $FAKE_PHONE/behave) in
    crash) kill -SEGV $$ ;;
    killed) kill -KILL $$ ;;
    memory) echo "ggml_aligned_malloc: insufficient memory; std::bad_alloc" >&2; kill -ABRT $$ ;;
    fail) echo "main: error: failed to load model 'text.gguf'" >&2; exit 1 ;;
    rubbish) echo "| model | size |"; exit 0 ;;
    hang) exec sleep 60 ;;
    slow) sleep 1 ;;
esac
ns=$(((prompt + new) * 2000000)) times= i=0
while [ $i -lt $repeat ]; do times="$times${times:+, }$((ns + i))" i=$((i + 1)); done
printf '{"build_commit": "8cf427ff", "build_number": 5163, "cpu_info": "ARMv8", "gpu_info": "%s", ' "$gpu"
printf '"backends": "CPU", "model_type": "phi2 1B Q4_0", "n_threads": %s, "n_prompt": %s, ' $threads $prompt
printf '"n_gen": %s, "n_depth": %s, "avg_ns": %s, ' $new $depth $ns
printf '"samples_ns": [ %s ],"samples_ts": [ 1 ]}\n' "$times"
"""
# tools/mtmd/mtmd-cli.cpp logs to stderr, the answer goes to stdout.
MTMD = r"""#!/bin/sh
echo "$@" >>$FAKE_PHONE/seen
echo "encoding mtmd batch, n_chunks = 1 (done = 1, total = 3)" >&2
echo "mtmd batch encoding done in 321 ms" >&2
sleep 0.3
echo "A"
"""
# onnxruntime/test/perftest: performance_runner.cc (PerformanceResult::DumpToFile), and ONNX Runtime's profile.
PERF_TEST = r"""#!/bin/sh
echo "$@" >>$FAKE_PHONE/perf
while [ $# -gt 0 ]; do
    case $1 in
        -I) ;;
        -e) unit=$2; shift ;; -r) repeat=$2; shift ;; -p) profile=$2; shift ;;
        -*) shift ;;
        *.onnx) model=$1 ;;
        *) result=$1 ;;
    esac
    shift
done
[ -f "$model" ] || { echo "Load model from $model failed"; exit 255; }
case $unit in
    nnapi) echo "NNAPI is not supported in this build" >&2; exit 255 ;;
    qnn) echo "QnnDevice_create failed 14001" >&2; exit 255 ;;
    webgpu) kill -SEGV $$ ;;
esac
if [ -n "$profile" ]; then
    provider=XnnpackExecutionProvider
    case $model in *vision_projection*) provider=$(cat $FAKE_PHONE/projection) ;; esac
    printf '[{"cat":"Session","name":"session_initialization","args":{}},' >${profile}_2026.json
    printf '{"cat":"Node","name":"a_kernel_time","args":{"provider":"%s"}},' $provider >>${profile}_2026.json
    printf '{"cat":"Node","name":"b_kernel_time","args":{"provider":"CPUExecutionProvider"}}]' >>${profile}_2026.json
fi
i=0
while [ $i -lt $repeat ]; do
    [ -n "$result" ] && echo "onnx,0.0$((i + 2))5,123456789,99,$i" >>"$result"
    i=$((i + 1))
done
[ -n "$result" ] && printf '\nMin Latency: 0.02 s\n' >>"$result"
echo "Session creation time cost: 0.25 s"
echo "Total inference requests: $repeat"
"""


class FakePhone:
    """The phone's folder, and what is done to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs = folder.parent / "programs"
        for name in ("bin", "data/local/tmp", "power_supply", "thermal_zone0"):
            (folder / name).mkdir(parents=True)
        self.set("devices", "R5CT1 device usb:1-1 product:husky model:Pixel_8_Pro device:husky transport_id:3\n")
        self.set("properties", "[ro.product.model]: [Pixel 8 Pro]\n[ro.soc.model]: [Tensor G3]\n[other]: []\n")
        self.set("battery", "Current Battery Service state:\n  level: 87\n  temperature: 291\n  status: 3\n")
        self.set("thermal_zone0/type", "BIG\n")
        self.set("thermal_zone0/temp", "41000\n")
        self.set("gpu", "Adreno (TM) 750")
        self.set("behave", "well")
        self.set("projection", "XnnpackExecutionProvider")
        self.program(folder / "bin/getprop", "#!/bin/sh\ncat $FAKE_PHONE/properties\n")
        self.program(folder / "bin/dumpsys", "#!/bin/sh\ncat $FAKE_PHONE/battery\n")
        for name, text in (("bin/llama-bench", LLAMA_BENCH), ("bin/llama-mtmd-cli", MTMD), ("lib/libggml.so", "ELF")):
            self.program(self.programs / "llama" / name, text)
        for name, text in (("onnxruntime_perf_test", PERF_TEST), ("libonnxruntime.so", "ELF")):
            self.program(self.programs / "ort" / name, text)

    def set(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def battery(self, current: str, status: str) -> None:
        for name, text in (("current_now", current), ("voltage_now", "4000000"), ("status", status)):
            self.set(f"power_supply/{name}", f"{text}\n")

    @staticmethod
    def program(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def device(self, **options: str):
        device = load_device("adb:R5CT1")
        own = {"llamacpp": str(self.programs / "llama"), "onnxruntime": str(self.programs / "ort")}
        return replace(device, options={**device.options, **own, **options})

    def open(self, **options: str):
        host = open_host(self.device(**options))
        host.open()
        return host

    def lines(self, name: str) -> list[str]:
        return (self.folder / name).read_text().splitlines()

    def files(self) -> list[str]:
        return sorted(str(p.relative_to(self.folder / ROOT)) for p in (self.folder / ROOT).rglob("*") if p.is_file())


@pytest.fixture
def phone(tmp_path, monkeypatch) -> FakePhone:
    folder = tmp_path / "bin"
    folder.mkdir()
    FakePhone.program(folder / "adb", FAKE.read_text().replace("#!/usr/bin/python3", f"#!{sys.executable}"))
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_PHONE", str(tmp_path / "phone"))
    return FakePhone(tmp_path / "phone")


@pytest.fixture(scope="module")
def onnx_bundles(tmp_path_factory, golden) -> dict[str, Path]:
    from vlmedge.pipeline import export

    made = {}
    for key, profile, flavour in (("f32", "f32", "ort"), ("int8", "w8a8-kv8", "ort"), ("portable", "f32", "portable")):
        out = tmp_path_factory.mktemp("onnx") / f"{key}.onnx"
        made[key] = export(golden, "onnx", profile, out, verify=False, threads=1, flavour=flavour).path
    return made


def job(bundle: Path, photo: Path, runtime: str = "llamacpp", unit: str = "cpu", **changes) -> Job:
    manifest = open_bundle(bundle).manifest
    variant = Variant(
        "label", str(bundle), fingerprint(str(bundle)), manifest.format, "f32", 1, 32.0, runtime, unit, threads=2
    )
    ask = Ask("small", str(photo), "ab" * 32, 300, 200, "What is it?")
    work = Work("test", (ask,), 8, repeat=2)
    return replace(Job("measure", "pixel", work, variant=variant), **changes)


def test_llamacpp_times_every_stage(phone, bundle, photo):
    phone.battery("-500000", "Discharging")
    host = phone.open()
    assert host.name == "adb R5CT1"
    assert host.units()["llamacpp"] == {"cpu": "", "vulkan": ""}
    asked = job(bundle, photo)
    reply = host.run(asked, 60)
    assert (reply.status, reply.reason) == ("ok", "")
    (task,) = tasks(asked, open_bundle(bundle))
    first, second = reply.samples
    assert (task.counts.crops, task.counts.encoded_crops, task.prefix) == (2, 1, 730)
    assert first.ms == pytest.approx({"vision": 321, "prefill": 2 * 730, "prompt": 2 * task.prompt, "decode": 2})
    assert second.ms["prefill"] == pytest.approx(2 * 730 + 1e-6)
    assert reply.counts == (task.counts,)
    assert reply.agreement is None
    assert "agreement is not measured" in reply.environment["notes"][0]
    assert reply.environment["phone"] == "Pixel 8 Pro"
    assert reply.environment["before"] == {"battery_percent": "87", "celsius": {"BIG": 41.0, "battery": 29.1}}
    assert reply.memory is not None
    assert reply.memory.peak is not None
    assert 0.5 < reply.memory.peak < 50
    assert reply.energy is not None
    assert reply.energy.joules is not None
    assert reply.energy.joules == pytest.approx(2.0 * reply.energy.seconds)
    bench = next(line for line in phone.lines("benched") if "-p 730" in line)
    assert "-t 2 -ngl 0 -dev none -p 730 -n 0 -r 2 -b 730 -ub 730 -o jsonl" in bench
    assert any("-n 7 -r 2" in line and f"-d {730 + task.prompt}" in line for line in phone.lines("benched"))
    assert all("--no-mmproj-offload" in line for line in phone.lines("seen"))
    assert decode(Reply, json.loads(json.dumps(encode(reply))), "reply") == reply


def test_older_programs_are_understood():
    assert read_encoded(Ran("", "encoding image slice...\nimage slice encoded in 12 ms\n", (), {})) == 12.0
    with pytest.raises(ProgramError, match="printed no time of encoding"):
        read_encoded(Ran("A cat.", "", (), {}))


def test_files_are_copied_once_and_stay_in_the_folder(phone, bundle, photo):
    host = phone.open()
    assert host.run(job(bundle, photo), 60).status == "ok"
    stored, calls = phone.files(), len(phone.lines("log"))
    digest = fingerprint(str(bundle))
    assert f"bundles/{digest}/text.gguf" in stored
    assert not [name for name in stored if name.endswith(".part") or name.startswith("runs") or "heads" in name]
    assert sum(name.startswith("programs/") for name in stored) == 3
    assert [p.name for p in (phone.folder / "data/local/tmp").iterdir()] == ["vlmedge"]
    text = phone.folder / ROOT / f"bundles/{digest}/text.gguf"
    text.write_bytes(b"cut")
    assert host.run(job(bundle, photo), 60).status == "ok"
    pushes = [line for line in phone.lines("log")[calls:] if " push " in line]
    assert len(pushes) == 1
    assert "text.gguf" in pushes[0]
    assert text.stat().st_size == (bundle / "text.gguf").stat().st_size


@pytest.mark.parametrize(
    ("behave", "status", "words"),
    [
        ("crash", "crashed", "SIGSEGV"),
        ("killed", "out_of_memory", "Android"),
        ("memory", "out_of_memory", "bad_alloc"),
        ("fail", "failed", "failed to load model"),
        ("rubbish", "rubbish", "no line of its results"),
    ],
)
def test_every_bad_end_is_a_reply(phone, bundle, photo, behave, status, words):
    host = phone.open()
    phone.set("behave", behave)
    reply = host.run(job(bundle, photo), 30)
    assert reply.status == status
    assert words in reply.reason
    assert "\n" not in reply.reason


def test_a_program_that_hangs_is_ended_on_the_phone(phone, bundle, photo):
    host = phone.open()
    host.units()
    phone.set("behave", "hang")
    started = time.monotonic()
    reply = host.run(job(bundle, photo), 2)
    assert reply.status == "hung"
    assert "2 s were over" in reply.reason
    assert time.monotonic() - started < 15
    assert not alive("sleep 60")


def test_a_program_ends_with_its_connection(tmp_path):
    """adbd sends SIGHUP to the shell; or this process, with adb, is killed: see `Phone.watch`."""
    run = tmp_path / "run"
    watching = subprocess.Popen(["sh", MEASURE, run, "60", "sleep", "61"])
    wait_for((run / "samples").exists)
    watching.send_signal(signal.SIGHUP)
    assert watching.wait(10) == 129
    assert not (run / "pid").exists()  # it may be another's soon
    assert not alive("sleep 61")


def test_a_phone_that_goes_is_lost(phone, bundle, photo):
    host = phone.open()
    host.units()
    phone.set("behave", "slow")
    phone.set("unplug", "measure")
    reply = host.run(job(bundle, photo), 30)
    assert reply.status == "lost"
    assert "the phone 'R5CT1' has gone" in reply.reason
    assert host.run(job(bundle, photo), 30).status == "lost"


def test_a_full_phone_is_said_and_nothing_is_left(phone, bundle, photo):
    host = phone.open()
    phone.set("full", "50000")
    reply = host.run(job(bundle, photo), 30)
    assert reply.status == "failed"
    assert "No space left on device" in reply.reason
    assert not [name for name in phone.files() if name.endswith(".part")]


def test_a_gpu_that_is_not_used_is_not_the_cpu(phone, bundle, photo):
    host = phone.open()
    assert host.run(job(bundle, photo, unit="vulkan"), 30).status == "ok"
    assert any("-ngl 99 -dev Vulkan0" in line for line in phone.lines("benched"))
    phone.set("gpu", "")
    reply = host.run(job(bundle, photo, unit="vulkan"), 30)
    assert (reply.status, "found no GPU" in reply.reason) == ("unavailable", True)
    reply = host.run(job(bundle, photo, unit="opencl"), 30)
    assert (reply.status, "no unit 'opencl'" in reply.reason) == ("unavailable", True)
    assert units_of("Available devices:\n  (none)\n") == {"cpu": "none"}


def test_onnxruntime_times_every_graph(phone, onnx_bundles, photo):
    host = phone.open()
    units = host.units()["onnxruntime"]
    assert {unit: bool(why) for unit, why in units.items()} == {
        "cpu": False, "xnnpack": False, "nnapi": True, "qnn": True, "webgpu": True,
    }  # fmt: skip
    assert "built without nnapi" in units["nnapi"]
    assert "QnnDevice_create failed" in units["qnn"]
    bundle = onnx_bundles["f32"]
    reply = host.run(job(bundle, photo, "onnxruntime"), 60)
    assert (reply.status, reply.reason) == ("ok", "")
    assert [sample.ms["decode"] for sample in reply.samples] == pytest.approx([25, 35])
    assert set(reply.samples[0].ms) == {"vision", "project", "prefill", "prompt", "decode"}
    assert reply.load is not None
    assert reply.load.ms == pytest.approx(3 * 250)
    assert reply.memory is None
    assert reply.energy is not None
    assert (reply.energy.joules, bool(reply.energy.reason)) == (None, True)
    decode = next(line for line in phone.lines("perf") if "-f sequence_length:1 " in line)
    assert "-I -m times -r 2 -e cpu -o 99 -x 2" in decode
    assert "region" not in "".join(phone.files())
    reply = host.run(job(bundle, photo, "onnxruntime", "xnnpack"), 60)
    assert reply.environment["nodes"]["vision_encoder"] == {"XnnpackExecutionProvider": 1, "CPUExecutionProvider": 1}
    phone.set("projection", "CPUExecutionProvider")
    reply = host.run(job(bundle, photo, "onnxruntime", "xnnpack"), 60)
    assert (reply.status, "no node of vision_projection.onnx" in reply.reason) == ("unavailable", True)


@pytest.mark.parametrize("kind", ["f32", "int8", "portable"])
def test_the_real_onnxruntime_takes_these_shapes(onnx_bundles, photo, kind):
    """As perf_test -I feeds a graph: zeros of the declared shapes, free dimensions as they were overridden, else 1."""
    import onnxruntime

    bundle = open_bundle(onnx_bundles[kind])
    (task,) = tasks(job(bundle.path, photo), bundle)
    timer = adb_onnxruntime.OnnxRuntime(None, "", "", bundle, "cpu")
    types = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int8)": np.int8}
    for stage in timer._stages(task):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        for name, size in adb_onnxruntime.shapes(stage, task, bundle).items():
            options.add_free_dimension_override_by_name(name, size)
        graph = str(bundle.path / f"onnx/{timer._graph(stage, task)}.onnx")
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        feeds = {
            node.name: np.zeros([n if isinstance(n, int) else 1 for n in node.shape], types[node.type])
            for node in session.get_inputs()
        }
        assert session.run(None, feeds), stage


def test_the_probe_is_a_model(tmp_path):
    import onnxruntime

    session = onnxruntime.InferenceSession(adb_onnxruntime.probe_model(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.ones(1, np.float32)})
    assert found.tolist() == [2.0]


def test_what_adb_cannot_measure_is_unavailable(phone, bundle, photo):
    host = phone.open()
    asked = job(bundle, photo)
    original = replace(asked.variant, format="checkpoint", runtime="torch")
    assert "ssh with Termux" in host.run(replace(asked, variant=original), 30).reason
    assert host.run(replace(asked, kind="anchor", variant=None), 30).status == "unavailable"
    wrong = replace(asked.variant, runtime="onnxruntime")
    assert "runs no gguf bundles" in host.run(replace(asked, variant=wrong), 30).reason
    gone = replace(asked.work, asks=(replace(asked.work.asks[0], picture="/gone.png"),))
    assert host.run(replace(asked, work=gone), 30).reason == "/gone.png cannot be read: No such file or directory"
    plain = open_host(load_device("adb:R5CT1"))
    plain.open()
    assert plain.units()["llamacpp"]["cpu"].startswith("no llama-bench was named; set llamacpp = FOLDER")
    reply = plain.run(asked, 30)
    assert (reply.status, "llamacpp = FOLDER" in reply.reason) == ("unavailable", True)
    empty = phone.open(llamacpp=str(phone.folder))
    shutil.rmtree(phone.programs / "ort")
    assert "has no onnxruntime_perf_test" in empty.units()["onnxruntime"]["cpu"]


def test_threads_and_processors_are_the_ones_that_were_asked_for(phone, bundle, photo):
    host = open_host(replace(phone.device(), threads=5))
    host.open()
    asked = job(bundle, photo)
    reply = host.run(replace(asked, variant=replace(asked.variant, threads=None, affinity=(0, 1))), 30)
    assert (reply.status, reply.threads) == ("ok", 5)
    assert all("-t 5 " in line for line in phone.lines("benched")[1:])
    assert any(" taskset 3 /data" in line for line in phone.lines("log"))


def test_sustain_goes_on_for_its_minutes(phone, bundle, photo):
    host = phone.open(onnxruntime="/nowhere")
    (phone.programs / "llama/bin/llama-mtmd-cli").unlink()
    asked = job(bundle, photo, kind="sustain")
    reply = host.run(replace(asked, work=replace(asked.work, minutes=0.02)), 60)
    assert reply.status == "ok"
    assert len({sample.at for sample in reply.samples}) > 1
    assert reply.samples[-1].at > 0.3
    assert "vision" not in reply.samples[0].ms
    assert reply.memory is None


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        ("", "adb lists no phone 'R5CT1', none at all"),
        ("R5CT1 unauthorized usb:1-1\n", "has not allowed this computer"),
        ("R5CT1 offline usb:1-1\n", "is offline"),
        ("R5CT1 no permissions (user in plugdev group?); see [http://x]\n", "cannot be opened by this user"),
        ("R5CT1 recovery usb:1-1\n", "is in the state 'recovery'"),
    ],
)
def test_a_phone_that_cannot_be_used_is_one_line(phone, devices, words):
    phone.set("devices", devices)
    with pytest.raises(RuntimeFailedError, match=words.replace("(", r"\(")) as error:
        phone.open()
    assert "\n" not in str(error.value)


def test_which_phone(phone, monkeypatch):
    device = replace(load_device("adb:x"), options={})
    phone.set("devices", "emulator-5554 device\nR5CT1 device usb:1-1\n")
    with pytest.raises(RuntimeFailedError, match="several phones, emulator-5554"):
        open_host(device).open()
    phone.set("devices", "")
    with pytest.raises(RuntimeFailedError, match="lists no phone; plug one in"):
        open_host(device).open()
    with pytest.raises(UsageError, match="did you mean 'serial'"):
        open_host(replace(device, options={"serail": "x"}))
    with pytest.raises(UsageError, match="must be one like /data/local/tmp"):
        open_host(replace(device, options={"folder": "/"}))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RuntimeFailedError, match="adb is not installed"):
        open_host(device).open()


def test_energy_needs_a_battery_that_is_used():
    used = "10.0 100 60 40 -500000 4000000 Discharging\n10.5 120 60 40 -700000 4000000 Discharging\n11 1"
    watched = read_samples(used)
    assert [watch.peak for watch in watched] == [100, 120]
    assert energy_of([watched]).joules == pytest.approx(0.5 * 2.4)
    for old, new, words in (
        ("Discharging", "Charging", "hangs on its cable"),
        ("-500000", "-", "cannot be read"),
        ("\n10.5 120 60 40 -700000 4000000 Discharging", "", "read twice"),
    ):
        energy = energy_of([read_samples(used.replace(old, new))])
        assert (energy.joules, words in energy.reason) == (None, True)


def alive(command: str) -> bool:
    """Is such a process of ours still there? A killed one may take a moment to go."""
    for _ in range(20):
        found = subprocess.run(["ps", "-eo", "stat,args"], capture_output=True, text=True, check=True).stdout
        if not any(line.split(None, 1)[1] == command and line[0] != "Z" for line in found.splitlines()):
            return False
        time.sleep(0.1)
    return True
