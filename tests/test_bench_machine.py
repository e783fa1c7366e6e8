"""What the benchmark knows of a machine: memory, energy, ceilings, a model's costs, what others take, versions."""

import ctypes
import importlib
import json
import math
import mmap
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vlmedge.bundle import open_bundle
from vlmedge.device_bench import ceiling, costs, memory
from vlmedge.device_bench.energy import (
    COUNTERS,
    OTHER,
    PROCESSOR,
    battery,
    jetson,
    meter,
    metered,
    nvidia,
    powermetrics,
    rapl,
)
from vlmedge.device_bench.energy.meter import Counted, Register, Sampled, Watched
from vlmedge.device_bench.environment import cpu_flags, environment, ram_bytes, windows_ram
from vlmedge.device_bench.job import Variant
from vlmedge.device_bench.memory import LinuxMemory, MacMemory, WindowsMemory
from vlmedge.device_bench.nvml import Nvml, opened
from vlmedge.device_bench.others import Others
from vlmedge.device_bench.result import Ceiling, Costs
from vlmedge.errors import RuntimeFailedError
from vlmedge.exporters import EXPORTERS
from vlmedge.exporters.choice import choose
from vlmedge.loading import describe
from vlmedge.pipeline import export
from vlmedge.records import encode

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def tree(root, files):
    """Files by path, with their text."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


# ---- memory -----------------------------------------------------------------------------------------------------


def test_memory_of_this_process(tmp_path):
    size = 64 << 20
    (tmp_path / "weights").write_bytes(b"\1" * size)
    anonymous, mapped = memory.split_mb()
    block = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # not what an allocator has kept
    block.write(b"\1" * size)
    with (tmp_path / "weights").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        assert sum(pages[:: mmap.PAGESIZE]) == size // mmap.PAGESIZE
        now = memory.split_mb()
    assert now[0] - anonymous == pytest.approx(size / 1e6, rel=0.1)
    assert now[1] - mapped == pytest.approx(size / 1e6, rel=0.1)
    top = memory.peak_mb()
    assert top >= memory.resident_mb() >= size / 1e6
    block.close()
    assert memory.peak_mb() >= top * 0.99
    if memory.reset_peak():  # not every container permits it
        assert memory.peak_mb() < top - 100


def test_a_system_that_tells_little(tmp_path):
    assert LinuxMemory(tmp_path).usage() == memory.Usage()
    assert not LinuxMemory(tmp_path).reset_peak()
    assert not list(tmp_path.iterdir())
    tree(tmp_path, {"status": "Name:\tx\nVmHWM:\t    2000 kB\nVmRSS:\t    1000 kB"})  # Linux before 4.5
    assert LinuxMemory(tmp_path).usage() == memory.Usage(resident=1024000.0, peak=2048000.0)


class FakeLibproc:
    """A footprint of 300 of 1000 resident bytes; its highest is 900, since the reset 400."""

    def proc_pid_rusage(self, pid, flavour, reference):
        assert flavour == 4
        found = reference._obj
        assert ctypes.sizeof(found) == 296  # as xnu's headers have it
        assert type(found).instructions_to_serviced_energy.offset == 248
        found.resident_size, found.phys_footprint = 1000, 300
        found.lifetime_max_phys_footprint, found.interval_max_phys_footprint = 900, 400
        return 0

    def proc_reset_footprint_interval(self, pid):
        return 0


def test_memory_of_macs():
    mac = MacMemory(FakeLibproc())
    assert mac.usage() == memory.Usage(300.0, 900.0, 300.0, 700.0)
    assert mac.reset_peak()
    assert mac.usage().peak == 400.0
    assert not MacMemory(object()).reset_peak()


class FakeKernel:
    """Windows with or without PROCESS_MEMORY_COUNTERS_EX2, which has 96 bytes where pointers have 8."""

    def __init__(self, sizes):
        self.sizes = sizes

    def GlobalMemoryStatusEx(self, reference):
        assert reference._obj.length == 64
        reference._obj.physical = 16_000_000_000
        return 1

    def GetCurrentProcess(self):
        return -1

    def K32GetProcessMemoryInfo(self, process, reference, size):
        found = reference._obj
        assert found.cb == size
        if size not in self.sizes:
            return 0
        found.working_set, found.peak_working_set, found.private_working_set = 1000, 2000, 400
        return 1


def test_memory_of_windows():
    assert WindowsMemory(FakeKernel({80, 96})).usage() == memory.Usage(1000.0, 2000.0, 400.0, 600.0)
    assert WindowsMemory(FakeKernel({80})).usage() == memory.Usage(1000.0, 2000.0)
    assert WindowsMemory(FakeKernel({})).usage() == memory.Usage()
    assert windows_ram(FakeKernel({})) == 16_000_000_000


# ---- NVIDIA -----------------------------------------------------------------------------------------------------


class FakeNvml:
    """Two GPUs of one driver, in the order of their numbers; energy grows by 5 J a reading."""

    def __init__(self, code=0, counts=True):
        self.code, self.counts, self.readings = code, counts, {0: 0, 1: 0}

    def nvmlInit_v2(self):
        return self.code

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, gpu):
        gpu._obj.value = 100 + index.value
        return 0 if index.value < 2 else 2

    def nvmlDeviceGetHandleByUUID(self, name, gpu):
        gpu._obj.value = 101
        return 0 if name == b"GPU-b" else 6

    def nvmlDeviceGetName(self, gpu, text, size):
        text.value = b"NVIDIA Orin"
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu, total):
        if not self.counts:
            return 3
        self.readings[gpu.value - 100] += 5000
        total._obj.value = self.readings[gpu.value - 100]
        return 0

    def nvmlDeviceGetComputeRunningProcesses_v3(self, gpu, count, found):
        count._obj.value = 3
        for i, (pid, used) in enumerate(((7, 1000), (8, 10), (7, (1 << 64) - 1))):
            found[i].pid, found[i].used = pid, used
        return 0


def test_gpus_that_this_process_sees():
    library = FakeNvml()
    handles = {
        names: [gpu.value for gpu in Nvml(library, {} if names is None else {"CUDA_VISIBLE_DEVICES": names}).gpus()]
        for names in (None, "1", "GPU-b", "", "5")
    }
    assert handles == {None: [100, 101], "1": [101], "GPU-b": [101], "": [], "5": []}
    nvml = opened(library)
    assert [nvml.process_bytes(nvml.gpus()[0], pid) for pid in (7, 8, 9)] == [1000, 10, 0]
    assert [nvml.name(gpu) for gpu in nvml.gpus()] == ["NVIDIA Orin"] * 2
    assert "nvidia-smi" in opened(FakeNvml(code=9))


def test_energy_of_gpus():
    found = nvidia.find(lambda: Nvml(FakeNvml(), {"CUDA_VISIBLE_DEVICES": "0"}), lambda: "")
    assert found.name == "nvml: GPU"
    found.start()
    assert found.stop() == pytest.approx(5.0)
    packages = Watched("rapl: package-0", Counted([Register(iter([0, 7]).__next__, 1.0)]), 1000.0)
    both = nvidia.find(lambda: Nvml(FakeNvml(), {}), lambda: packages)
    assert both.name == "nvml: 2 GPUs + rapl: package-0"
    both.start()
    assert both.stop() == pytest.approx(5.0 + 5.0 + 7.0)
    assert "Volta" in nvidia.find(lambda: Nvml(FakeNvml(counts=False), {}), lambda: "")
    assert nvidia.find(lambda: "", lambda: packages) == ""  # packages do not hold what a GPU took


# ---- energy of processors and devices ---------------------------------------------------------------------------


def zone(root, path, name, energy, highest=262143328850):
    tree(root / path, {"name": name, "energy_uj": energy, "max_energy_range_uj": highest})


@pytest.fixture
def powercap(tmp_path):
    """Two packages with cores and memory, a board, the packages again; subzones are linked to as in /sys/class."""
    for n, energy in enumerate((5_000_000, 900_000_000)):
        zone(tmp_path, f"intel-rapl:{n}", f"package-{n}", energy, 1_000_000_000)
        zone(tmp_path, f"intel-rapl:{n}/intel-rapl:{n}:0", "core", 1)
        zone(tmp_path, f"intel-rapl:{n}/intel-rapl:{n}:1", "dram", 2_000_000)
        (tmp_path / f"intel-rapl:{n}:1").symlink_to(tmp_path / f"intel-rapl:{n}/intel-rapl:{n}:1")
    zone(tmp_path, "intel-rapl:2", "psys", 1)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 1)
    return tmp_path


def test_rapl_adds_packages_and_memory_and_goes_on_behind_the_highest(powercap):
    found = rapl.find(powercap)
    assert found.name == "rapl: package-0, dram, package-1, dram"
    found.start()
    zone(powercap, "intel-rapl:0", "package-0", 8_000_000, 1_000_000_000)
    zone(powercap, "intel-rapl:1", "package-1", 4_000_000, 1_000_000_000)  # 900 -> 1000, then 0 -> 4
    zone(powercap, "intel-rapl:1/intel-rapl:1:1", "dram", 2_500_000)
    for beside in ("intel-rapl:2", "intel-rapl-mmio:0", "intel-rapl:0/intel-rapl:0:0"):
        zone(powercap, beside, "x", 77_000_000)
    assert found.stop() == pytest.approx(3 + 104 + 0.5)


def test_rapl_that_is_roots(powercap, monkeypatch):
    read = Path.read_text

    def refuse(path, **words):
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, **words)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert f"sudo chmod a+r {powercap}/intel-rapl:*/energy_uj" in rapl.find(powercap)
    assert rapl.find(powercap / "nowhere") == ""


def test_watts_are_added_up_between_readings():
    source = Sampled(iter([10.0, 20.0, 20.0]).__next__)
    source.begin(100.0)
    source.take(101.0)
    source.take(103.0)
    assert source.joules == 15 + 40


def test_a_meter_reads_on_by_itself_and_can_be_used_again():
    readings = []

    def watts():
        readings.append(1)
        return 2.0

    seen = []
    source = Watched("x", Sampled(watts), 0.001)
    for _ in range(2):
        with metered(source) as reading:
            while len(readings) < 5 * (len(seen) + 1):
                time.sleep(0.001)
        seen.append(reading)
    for reading in seen:
        assert reading.joules == pytest.approx(2 * reading.seconds, rel=0.2, abs=0.01)
        assert reading.energy(4).per_answer == reading.joules / 4


def test_a_counter_that_fails_on_the_way_is_a_reason():
    lost = Watched("x", Counted([Register(iter([5, 3]).__next__, 1.0)]), 1000.0)
    with metered(lost) as reading:
        pass
    assert (reading.joules, reading.energy(1).per_answer) == (None, None)
    assert "set back" in reading.reason
    with metered("no counter: buy one") as reading:
        pass
    assert encode(reading.energy(3))["reason"] == "no counter: buy one"


def rails(root, chip, values):
    files = {"name": "ina3221"}
    for channel, (name, millivolts, milliamperes) in enumerate(values, 1):
        files |= {f"in{channel}_label": name, f"in{channel}_input": millivolts, f"curr{channel}_input": milliamperes}
    tree(root / chip, files)


def watts_of(found):
    """Watts at the first reading, over 2 s on a clock of our own."""
    found._clock = iter([0.0, 2.0]).__next__
    found._period = 1000.0
    found.start()
    return found.stop() / 2


def test_a_boards_input_or_all_its_rails(tmp_path):
    assert jetson.find(tmp_path) == ""
    tree(tmp_path / "hwmon0", {"name": "coretemp", "in1_label": "VDD_IN", "in1_input": 1, "curr1_input": 1})
    rails(tmp_path, "hwmon1", [("VDD_GPU_SOC", 800, 5000), ("VDD_CPU_CV", 700, 3000), ("NC", 0, 0)])
    found = jetson.find(tmp_path)
    assert found.name == "ina3221: VDD_GPU_SOC, VDD_CPU_CV"
    assert watts_of(found) == pytest.approx(4.0 + 2.1)
    rails(tmp_path, "hwmon2", [("VDD_IN", 5000, 2400), ("VDD_SOC", 5000, 600)])
    found = jetson.find(tmp_path)
    assert found.name == "ina3221: VDD_IN"
    assert watts_of(found) == pytest.approx(12.0)
    (tmp_path / "hwmon2/curr1_input").write_text("N/A")
    assert "cannot be read" in jetson.find(tmp_path)


def test_batteries_only_while_they_are_discharged(tmp_path):
    assert battery.find(tmp_path) == ""
    tree(tmp_path / "AC", {"type": "Mains"})
    tree(tmp_path / "mouse", {"type": "Battery", "scope": "Device", "status": "Discharging", "power_now": 1})
    tree(tmp_path / "BAT0", {"type": "Battery", "status": "Charging", "power_now": 9_000_000})
    assert "unplug" in battery.find(tmp_path)
    tree(tmp_path / "BAT0", {"status": "Discharging"})
    both = {"type": "Battery", "status": "Discharging", "current_now": -500_000, "voltage_now": 4_000_000}
    tree(tmp_path / "BAT1", both)
    found = battery.find(tmp_path)
    assert found.name == "battery: BAT0, BAT1"
    assert watts_of(found) == pytest.approx(9.0 + 2.0)
    found = battery.find(tmp_path)
    with metered(found) as reading:
        tree(tmp_path / "BAT0", {"status": "Charging"})
    assert reading.joules is None
    assert "charged meanwhile" in reading.reason


POWERMETRICS = """
import plistlib, signal, sys, time
def sample(**processor):
    sys.stdout.buffer.write(plistlib.dumps({"elapsed_ns": 500_000_000, "processor": processor}) + b"\\0")
    sys.stdout.buffer.flush()
sample(combined_power=4000.0); sample(combined_power=8000.0)
sys.stdout.buffer.write(b"<?xml version='1.0'?><plist><dict>"); sys.stdout.buffer.flush()
open(sys.argv[1], "w").close()
time.sleep(60)
"""


def test_powermetrics(tmp_path):
    ready = tmp_path / "ready"
    found = powermetrics.PowerMetrics((sys.executable, "-c", POWERMETRICS, str(ready)), iter([10.0, 13.0]).__next__)
    found.start()
    while not ready.exists():
        time.sleep(0.01)
    assert found.stop() == pytest.approx(6.0 * 3)
    silent = powermetrics.PowerMetrics((sys.executable, "-c", ""))
    silent.start()
    with pytest.raises(RuntimeFailedError, match="no sample"):
        silent.stop()
    intel = b"\n<?xml version='1.0'?><plist version='1.0'><dict><key>elapsed_ns</key><integer>1000000000</integer><key>"
    intel += b"processor</key><dict><key>package_joules</key><real>7.5</real></dict></dict></plist>\n"
    assert list(powermetrics.parsed(intel)) == [(1.0, 7.5)]
    assert powermetrics.find("linux") == ""


def test_which_counter_is_taken():
    assert set(COUNTERS) == {*PROCESSOR, *OTHER}
    working = {name: Watched(name, Sampled(lambda: 1.0), 1.0) for name in COUNTERS}
    have = {name: (lambda name=name: working[name]) for name in COUNTERS}
    assert [meter(unit, have).name for unit in ("cpu", "cuda", "metal")] == ["jetson"] * 3
    have |= {"jetson": lambda: ""}
    found = [meter(unit, have).name for unit in ("cpu", "cuda", "metal", "xnnpack", "wasm")]
    assert found == ["rapl", "nvidia", "nvidia", "rapl", "rapl"]
    have |= {"rapl": lambda: "chmod it", "powermetrics": lambda: "", "battery": lambda: "unplug it"}
    assert meter("cpu", have) == "chmod it; unplug it"
    assert "no energy counter for 'cuda'" in meter("cuda", {name: lambda: "" for name in COUNTERS})
    assert isinstance(meter(), (str, Watched))  # of this machine, whatever it has


# ---- ceilings and costs -----------------------------------------------------------------------------------------


def test_ceilings_are_measured_and_the_memory_is_given_back():
    before = memory.resident_mb()
    assert 0.2 < ceiling.read_bandwidth(1, 256 << 20) < 5000
    assert memory.resident_mb() < before + 64
    rates = dict(ceiling.product_rates(1))
    assert {"f32", "int8"} <= set(rates)
    assert all(0.5 < rate < 1e6 for rate in rates.values())


def variant(source, format="checkpoint", dtype=""):
    return Variant("x", str(source), "", format, "", 0, None, "", dtype=dtype)


def test_costs_of_bundles_and_of_the_original(bundle, golden, tmp_path):
    spec = describe(golden).spec
    read = {n: math.prod(s) for n, s in spec.tensors().items() if n.startswith("decoder.") and "embed" not in n}
    per_token = sum(read.values())
    kv = 2 * spec.decoder.layers * spec.decoder.kv_heads * spec.decoder.head_dim
    f32, bf16 = (costs.costs(variant(golden, dtype=dtype), spec, 10) for dtype in ("f32", "bf16"))
    assert (f32.weight_bytes_per_token, f32.kv_bytes_per_token) == (4 * per_token, 40 * kv)
    assert (bf16.weight_bytes_per_token, bf16.kv_bytes_per_token) == (2 * per_token, 20 * kv)
    stored = costs.costs(variant(bundle, "gguf"), spec, 10)
    assert stored.weight_bytes_per_token == 4 * per_token
    assert stored.kv_bytes_per_token == 10 * open_bundle(bundle).manifest.memory.kv_per_position
    assert (stored.flops_per_crop, stored.flops_prefill) == (f32.flops_per_crop, f32.flops_prefill)
    # turbo has a second copy of the decoder, which decoding does not read.
    sizes = {}
    for profile in ("q4-fast", "turbo"):
        out = export(golden, "onnx", profile, tmp_path / profile, verify=False, threads=1).path
        assert "onnx" in open_bundle(out).manifest.format
        sizes[profile] = costs.costs(variant(out, "onnx"), spec, 0).weight_bytes_per_token
    assert sizes["turbo"] == sizes["q4-fast"] < 4 * per_token


@pytest.fixture(scope="module")
def moondream():
    """The spec of moondream2 at its real size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("real_size").Size().spec()


# MB per token of docs/benchmarks.md, which are sizes of files; the KV cache's part is of 758 positions.
@pytest.mark.parametrize(
    ("format", "profile", "megabytes"),
    [
        ("onnx", "q4-fast", 762),
        ("onnx", "turbo", 762),
        ("onnx", "q4", 1114),
        ("onnx", "w8a8", 1618),
        ("gguf", "q4_0", 917),
        ("gguf", "q4", 982),
    ],
)
def test_a_token_reads_what_the_benchmarks_say(moondream, format, profile, megabytes):
    order = choose(format, profile).order(moondream)
    stored = {name: encoding.bytes for name, encoding in EXPORTERS[format].encodings(order).items()}
    weights = costs.read_per_token(moondream.decoder, stored)
    kv = 758 * 2 * 24 * 2048 * {"f32": 4, "f16": 2, "int8": 1}[order.kv_cache]
    assert (weights + kv) / 1e6 == pytest.approx(megabytes, rel=5e-3)


def test_operations_of_the_real_size(moondream):
    assert costs.crop_flops(moondream.vision) / 1e9 == pytest.approx(666, abs=1)
    # 730 rows through 24 layers of 12 x 2048^2 weights, attention, and one row of 51200 logits.
    assert costs.picture_positions(moondream) == 730
    assert costs.prefill_flops(moondream) == pytest.approx(
        2 * 730 * 24 * 12 * 2048**2 + 24 * 4 * 730**2 * 2048 + 2 * 2048 * moondream.decoder.vocab
    )


def test_a_tied_table_is_read_as_the_head(moondream):
    sizes = {"decoder.embed.weight": 5, "decoder.embed.weight#2": 7, "decoder.norm.weight": 1, "vision.x": 9}
    assert costs.read_per_token(moondream.decoder, sizes) == 1
    assert costs.read_per_token(replace(moondream.decoder, tied_head=True), sizes) == 6


def test_fractions_of_the_ceiling():
    asked = Costs(flops_per_crop=1e9, flops_prefill=4e9, weight_bytes_per_token=6e8, kv_bytes_per_token=4e8)
    found = costs.reached(
        {"vision": 100.0, "prefill": 50.0, "decode": 100.0}, 5, asked, Ceiling(2, 20.0, {"f32": 100.0, "int8": 160.0})
    )
    assert found == pytest.approx({"vision": 5 / 16, "prefill": 0.5, "decode": 0.5})
    assert costs.reached({"decode": 100.0}, 5, asked, Ceiling(2, 20.0, {})) == pytest.approx({"decode": 0.5})
    assert costs.reached({}, 5, asked, Ceiling(2, 20.0, {"f32": 1.0})) == {}


# ---- others, environment ----------------------------------------------------------------------------------------


def test_processors_that_others_took(tmp_path):
    stat = tmp_path / "stat"
    assert Others(stat).mean() is None
    stat.write_text("cpu  1000 0 500 90000 10 0 0 0 0 0\ncpu0 1 2 3\n")
    others = Others(stat, iter([10.0, 12.5]).__next__, iter([0.0, 5.0]).__next__)
    stat.write_text("cpu  1400 0 500 91000 10 0 0 100 0 0\ncpu0 1 2 3\n")  # 5 s busy, 2.5 s of them ours, in 5 s
    assert others.mean() == pytest.approx(0.5)


def test_the_environment_of_this_machine():
    facts = environment()
    assert json.loads(json.dumps(facts)) == facts
    assert {"cpu", "cores", "ram_mb", "system", "kernel", "python", "vlmedge", "packages"} <= set(facts)
    assert facts["packages"]["numpy"] == np.__version__
    assert ram_bytes() > 1 << 29


def test_the_environment_of_a_board(tmp_path):
    cpufreq = "sys/devices/system/cpu/cpufreq/policy0/scaling_"
    root = tree(
        tmp_path,
        {
            "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimddp\nCPU part\t: 0xd0b\n\nprocessor\t: 1",
            "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
            "proc/meminfo": "MemTotal:        8000000 kB\nMemAvailable:    5000000 kB",
            "sys/fs/cgroup/memory.max": 4_000_000_000,
            f"{cpufreq}governor": "ondemand",
            f"{cpufreq}cur_freq": 1500000,
            f"{cpufreq}min_freq": 1000000,
            f"{cpufreq}max_freq": 2400000,
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
            "sys/class/thermal/thermal_zone0/temp": 51234,
            "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never",
            "etc/os-release": 'NAME="Debian"\nPRETTY_NAME="Debian GNU/Linux 12"',
        },
    )
    facts = environment(root)
    assert facts["cpu"] == "Raspberry Pi 5 Model B Rev 1.0"
    assert cpu_flags(root) == {"asimd", "asimddp"}
    assert (facts["ram_mb"], facts["available_mb"]) == (4000, 5120)
    assert (facts["governor"], facts["mhz"]) == ("ondemand", {"policy0": [1500, 1000, 2400]})
    assert (facts["temperatures"], facts["huge_pages"]) == ({"cpu-thermal": 51.234}, "madvise")
    assert facts["system"] == "Debian GNU/Linux 12"
    assert "virtual" not in facts
