"""A phone on a cable (or over Wi-Fi) through adb: stock programs that the user names, pushed, run, watched, and read.

Not run here on a phone: tested against a fake adb and against what the programs print, see tests/test_bench_adb.py.

Options of the device: `serial`; `folder` on the phone, where everything is written (/data/local/tmp/vlmedge);
`llamacpp`, a folder here with llama-bench and llama-mtmd-cli built for Android (docs/android.md of ggml-org/llama.cpp);
`onnxruntime`, one with onnxruntime_perf_test and libonnxruntime.so (https://onnxruntime.ai/docs/build/android.html).

These programs time the tower, prefill and decoding; they answer no question of ours, so there is no agreement and no
first token. A phone with Termux and its sshd is an ssh device ("ssh:user@phone"), where everything is measured.
"""

from __future__ import annotations

import shlex
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Final

from vlmedge.bundle import Bundle, open_bundle
from vlmedge.device_bench.device import Device
from vlmedge.device_bench.hosts import adb_llamacpp, adb_onnxruntime
from vlmedge.device_bench.hosts.adb_bridge import Phone, PhoneLostError, find_phone, last_line
from vlmedge.device_bench.hosts.adb_run import MEASURE, ProgramError, Runner
from vlmedge.device_bench.hosts.adb_stages import Sweep, Task, digest_of, program_files, tasks
from vlmedge.device_bench.hosts.host import Units
from vlmedge.device_bench.job import Job, Variant
from vlmedge.device_bench.result import Load, Reply
from vlmedge.errors import RuntimeFailedError, UsageError, VlmedgeError, nearest

FOLDER: Final = "/data/local/tmp/vlmedge"
PROGRAMS: Final = {"llamacpp": adb_llamacpp.PROGRAMS, "onnxruntime": adb_onnxruntime.PROGRAMS}
FORMATS: Final = {"llamacpp": "gguf", "onnxruntime": "onnx"}
OPTIONS: Final = ("serial", "folder", *PROGRAMS)
_SILENT: Final = "it printed nothing"
_PROBE = 60.0  # seconds for a program to say what it can do
_FACTS = {
    "phone": "ro.product.model",
    "maker": "ro.product.manufacturer",
    "soc": "ro.soc.model",
    "soc_maker": "ro.soc.manufacturer",
    "android": "ro.build.version.release",
    "build": "ro.build.display.id",
    "abi": "ro.product.cpu.abi",
}


class AdbHost:
    """One phone."""

    def __init__(self, device: Device) -> None:
        """Raises UsageError for an option that it does not have."""
        for key in device.options:
            if key not in OPTIONS:
                raise UsageError(f"the device '{device.name}' has the unknown option '{key}'{nearest(key, OPTIONS)}")
        self._device = device
        self._folder = device.options.get("folder", FOLDER).rstrip("/")
        self._phone: Phone | None = None
        self._programs: dict[str, str] = {}
        self._units: dict[str, dict[str, str]] = {}
        self._llama_devices: dict[str, str] = {}
        if not PurePosixPath(self._folder).is_absolute() or self._folder.count("/") < 2:
            raise UsageError(f"the folder '{self._folder}' of '{device.name}' must be one like {FOLDER}")

    @property
    def name(self) -> str:
        """The word "adb" and the serial number."""
        serial = self._phone.serial if self._phone else self._device.options.get("serial", "")
        return f"adb {serial}".rstrip()

    @property
    def machine(self) -> str:
        """The device itself."""
        return self.name

    def open(self) -> None:
        """Find the phone, make the folder there and put the script that watches programs into it.

        Raises RuntimeFailedError as `find_phone`, and where the folder cannot be written.
        """
        phone = Phone(find_phone(self._device.options.get("serial", "")))
        made = phone.shell("mkdir", "-p", f"{self._folder}/runs")
        if made.code != 0:
            raise RuntimeFailedError(f"{self._folder} cannot be made on the phone '{phone.serial}'; set another folder")
        phone.push(MEASURE, f"{self._folder}/measure.sh")
        self._phone = phone

    def units(self) -> Units:
        """What can compute there, asked of the programs themselves."""
        return {runtime: self._units_of(runtime) for runtime in PROGRAMS}

    def run(self, job: Job, timeout: float) -> Reply:
        """Time the job's stages by stock programs; `repeat` times each, `min_seconds` is not looked at."""
        variant = job.variant
        if variant is None or variant.is_original or job.kind not in ("measure", "sustain"):
            what = "the original runs" if variant is not None else "ceilings are measured"
            return Reply("unavailable", f"{what} in Python, which adb's user has not; use ssh with Termux on the phone")
        try:
            return self._reply(job, variant, timeout)
        except PhoneLostError as error:
            return Reply("lost", str(error))
        except ProgramError as error:
            return Reply(error.status, str(error))
        except VlmedgeError as error:
            return Reply("failed", str(error))
        except OSError as error:
            return Reply("failed", f"{error.filename} cannot be read: {error.strerror}")

    def close(self) -> None:
        """Let go; bundles and programs stay in the folder for the next run."""
        self._phone = None

    # ---- inside -----------------------------------------------------------------------------------------------

    def _reply(self, job: Job, variant: Variant, timeout: float) -> Reply:
        units = self._units_of(variant.runtime) if variant.runtime in PROGRAMS else {}
        why = units.get(variant.unit, f"{variant.runtime} has no unit '{variant.unit}' on this phone")
        if why:
            # Without a program there is one unit, the CPU, with the reason: it holds for every other one too.
            return Reply("unavailable", units["cpu"] if units.get("cpu") else why)
        threads = variant.threads or self._device.threads  # all cores of a phone are slower than its fast ones
        variant = replace(variant, threads=threads)
        job = replace(job, variant=variant)
        phone, bundle = self._connected(), open_bundle(variant.source)
        if bundle.manifest.format != FORMATS[variant.runtime]:
            return Reply(
                "failed", f"{variant.runtime} runs no {bundle.manifest.format} bundles; choose another runtime"
            )
        before = self._battery(phone)
        asked = tasks(job, bundle)
        runner = Runner(phone, self._folder, timeout, variant.affinity)
        try:
            sweep = self._sweeps(job, variant, bundle, asked, runner)
        finally:
            runner.clean()
        peaks = [ran.memory for ran in runner.ran if ran.peak_mb is not None]
        # One process holds the whole model only in llama-mtmd-cli, the largest of llama.cpp's.
        whole = variant.runtime == "llamacpp" and any("vision" in sample.ms for sample in sweep.samples)
        return Reply(
            "ok",
            load=None if sweep.load_ms is None else Load(sweep.load_ms, 0.0, ""),
            samples=sweep.samples,
            counts=tuple(task.counts for task in asked),
            memory=max(peaks, key=lambda memory: memory.peak or 0.0) if whole and peaks else None,
            energy=runner.energy(),
            threads=threads,
            environment=self._environment(phone)
            | sweep.environment
            | {"before": before, "after": self._battery(phone)},
        )

    def _sweeps(self, job: Job, variant: Variant, bundle: Bundle, asked: tuple[Task, ...], runner: Runner) -> Sweep:
        """One sweep over all stages, or as many as a sustain job's minutes have time for."""
        prepare = {"llamacpp": self._llamacpp, "onnxruntime": self._onnxruntime}[variant.runtime]
        once = prepare(job, variant, bundle, asked, runner)
        started, found = time.monotonic(), [once(0.0)]
        while job.kind == "sustain" and (at := time.monotonic() - started) < job.work.minutes * 60:
            found.append(once(at))
        every = tuple(sample for sweep in found for sample in sweep.samples)
        return Sweep(every, found[-1].environment, found[0].load_ms)

    def _llamacpp(
        self, job: Job, variant: Variant, bundle: Bundle, asked: tuple[Task, ...], runner: Runner
    ) -> Callable[[float], Sweep]:
        phone, model = self._connected(), f"{self._folder}/bundles/{variant.digest}"
        self._put(bundle, adb_llamacpp.files_of(bundle), model)
        pictures = [self._picture(task) for task in asked]
        programs = self._programs["llamacpp"]
        timer = adb_llamacpp.LlamaCpp(runner, programs, model, bundle, self._llama_devices[variant.unit])
        can_see = "llama-mtmd-cli" in phone.sizes(programs)
        return lambda at: timer.sweep(job, asked, pictures, can_see, at)

    def _onnxruntime(
        self, job: Job, variant: Variant, bundle: Bundle, asked: tuple[Task, ...], runner: Runner
    ) -> Callable[[float], Sweep]:
        model = f"{self._folder}/bundles/{variant.digest}"
        self._put(bundle, adb_onnxruntime.files_of(bundle), model)
        timer = adb_onnxruntime.OnnxRuntime(runner, self._programs["onnxruntime"], model, bundle, variant.unit)
        return lambda at: timer.sweep(job, asked, at)

    def _put(self, bundle: Bundle, names: tuple[str, ...], remote: str) -> None:
        """Copy the bundle's files that are not there yet, under the bundle's digest."""
        self._copy({name: bundle.path / name for name in names}, remote)

    def _picture(self, task: Task) -> str:
        """Copy a picture, once, under its own hash."""
        picture = Path(task.ask.picture)
        folder = f"{self._folder}/pictures"
        name = f"{task.ask.sha256[:16]}{picture.suffix}"
        self._copy({name: picture}, folder)
        return f"{folder}/{name}"

    def _copy(self, files: Mapping[str, Path], remote: str) -> None:
        phone = self._connected()
        there = phone.sizes(remote)
        missing = {name: path for name, path in files.items() if there.get(name) != path.stat().st_size}
        if not missing:
            return
        folders = sorted({str(PurePosixPath(remote, name).parent) for name in missing})
        phone.shell("mkdir", "-p", *folders)
        for name, path in missing.items():
            phone.push(path, f"{remote}/{name}")

    def _put_programs(self, runtime: str) -> str:
        """Copy what a user named as a runtime's programs, and make it executable; the folder on the phone."""
        if runtime not in self._programs:
            files = program_files(self._device.options[runtime], PROGRAMS[runtime], runtime)
            remote = f"{self._folder}/programs/{digest_of(files)}"
            self._copy({path.name: path for path in files}, remote)
            self._connected().script(f"chmod 755 {shlex.quote(remote)}/*")
            self._programs[runtime] = remote
        return self._programs[runtime]

    def _units_of(self, runtime: str) -> Mapping[str, str]:
        if runtime not in self._units:
            ask = {"llamacpp": self._llamacpp_units, "onnxruntime": self._onnxruntime_units}[runtime]
            self._units[runtime] = self._missing(runtime) or ask()
        return self._units[runtime]

    def _llamacpp_units(self) -> dict[str, str]:
        remote = self._put_programs("llamacpp")
        command = shlex.join(["env", f"LD_LIBRARY_PATH={remote}", f"{remote}/llama-bench", "--list-devices"])
        done = self._connected().script(command, _PROBE)
        if done.code != 0:
            return {"cpu": f"llama-bench does not run on the phone: {last_line(done) or _SILENT}"}
        self._llama_devices = adb_llamacpp.units_of(done.stdout)
        return dict.fromkeys(self._llama_devices, "")

    def _onnxruntime_units(self) -> dict[str, str]:
        remote = self._put_programs("onnxruntime")
        with tempfile.TemporaryDirectory() as here:
            model = Path(here, "probe.onnx")
            model.write_bytes(adb_onnxruntime.probe_model())
            self._copy({"probe.onnx": model}, f"{self._folder}/probe")
        return {unit: self._probe(remote, unit) for unit in adb_onnxruntime.UNITS}

    def _probe(self, remote: str, unit: str) -> str:
        """Why perf_test runs no graph of one node with the provider; "" where it does."""
        settings = [f"{key}={value}" for key, value in adb_onnxruntime.variables(remote).items()]
        program = f"{remote}/{adb_onnxruntime.PROGRAMS[0]}"
        words = ["env", *settings, program, "-I", "-m", "times", "-r", "1", "-e", unit]
        words += [*adb_onnxruntime.OPTIONS.get(unit, ()), f"{self._folder}/probe/probe.onnx"]
        done = self._connected().shell(*words, timeout=_PROBE)
        said = last_line(done) or _SILENT
        return "" if done.code == 0 else adb_onnxruntime.reason_of(Path(program), unit, said)

    def _missing(self, runtime: str) -> dict[str, str]:
        """Why a runtime has no programs, as its units; empty where they were named and are on the phone now."""
        if runtime not in self._device.options:
            what = f"no {PROGRAMS[runtime][0]} was named"
            return {"cpu": f"{what}; set {runtime} = FOLDER, a build for Android, in [options] of a device's TOML"}
        try:
            self._put_programs(runtime)
        except PhoneLostError:
            raise
        except RuntimeFailedError as error:
            return {"cpu": str(error)}
        except OSError as error:
            return {"cpu": f"{error.filename} cannot be read: {error.strerror}"}
        return {}

    def _connected(self) -> Phone:
        if self._phone is None:
            raise RuntimeFailedError(f"{self.name} is not connected; open it first")
        return self._phone

    def _environment(self, phone: Phone) -> dict[str, Any]:
        found = phone.properties()
        facts: dict[str, Any] = {key: found[name] for key, name in _FACTS.items() if found.get(name)}
        facts["kernel"] = phone.shell("uname", "-r").stdout.strip()
        return facts

    def _battery(self, phone: Phone) -> dict[str, Any]:
        """Level in %, temperatures in degrees Celsius, as far as adb's user may read them."""
        lines = (line.strip().partition(": ") for line in phone.shell("dumpsys", "battery").stdout.splitlines())
        battery = {key: value for key, _, value in lines if key in ("level", "temperature", "status")}
        zones = phone.script('for z in /sys/class/thermal/thermal_zone*; do echo "$(cat $z/type) $(cat $z/temp)"; done')
        rows = (line.split() for line in zones.stdout.splitlines())
        heat = {row[0]: int(row[1]) / 1000 for row in rows if len(row) == 2 and row[1].lstrip("-").isdigit()}
        if battery.get("temperature", "").lstrip("-").isdigit():
            heat["battery"] = int(battery["temperature"]) / 10
        return {"battery_percent": battery.get("level", ""), "celsius": heat}
