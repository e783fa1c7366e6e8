"""A tethered iPhone or iPad as a host: a Core ML bundle's models, loaded and run there by coremltools' own benchmarker.

Facts of coremltools 9.0, `coremltools.models.ml_program.experimental` (read in the wheel; not run here, it takes a Mac
with Xcode and a phone in developer mode):

    remote_device.Device.get_connected_devices(device_type)          needs `devicectl` on PATH, ValueError else
    await device.prepare_for_model_debugging(credentials, working_directory, clean)   builds an app with xcodebuild,
        signs it (AppSigningCredentials.development_team), launches it; the Device that it returns has a session
    perf_utils.MLModelBenchmarker(model, device)                     of an MLModel: an .mlpackage, never an .mlmodelc
    await benchmarker.benchmark_load(iterations)                     `samples` in ms, as the phone's Core ML took them
    await benchmarker.benchmark_predict(inputs, iterations, warmup)  the same, without the way there
    coremltools.ComputeUnit                                          ALL, CPU_AND_GPU, CPU_ONLY, CPU_AND_NE

Its limits: inputs are random, of the declared (default) shapes; pictures as inputs are refused; a model with state gets
none on a phone. So there are no answers, hence no agreement, and a sample is one call of each model.

Options of the device: `name` (of the phone, or its UDID; else the only one that is connected), `team` (the development
team that signs the app), `folder` (where the app is built; else a temporary one, and it is built again each time).
"""

from __future__ import annotations

import asyncio
import importlib
import platform
import re
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from vlmedge.bundle import Bundle, open_bundle
from vlmedge.device_bench.hosts.host import Units
from vlmedge.device_bench.job import Job, Variant, Work
from vlmedge.device_bench.outcome import excerpt
from vlmedge.device_bench.result import Load, Reply, Sample
from vlmedge.errors import MissingExtraError, RuntimeFailedError, UsageError, VlmedgeError

if TYPE_CHECKING:
    from vlmedge.device_bench.device import Device

OPTIONS: Final = frozenset(("name", "team", "folder"))
RUNTIME: Final = "coreml"
UNITS: Final = ("all", "cpu_and_gpu", "cpu_and_ne", "cpu_only")
ASK: Final = "random inputs"
NO_AGREEMENT: Final = "coremltools' benchmarker feeds random inputs and gives no outputs back"
_PLAIN = re.compile(r"[\w@%+=:,./~-]+", re.ASCII)  # what no shell reads otherwise, and a home folder
_EXPERIMENTAL = "coremltools.models.ml_program.experimental"
# A bundle's component -> the stage of one call of its model.
_STAGES: Final = {"vision": "vision", "projector": "project", "decoder": "decode"}


class IphoneHost:
    """Runs the models of Core ML bundles on a phone at this Mac's cable."""

    def __init__(self, device: Device) -> None:
        unknown = sorted(set(device.options) - OPTIONS)
        if unknown:
            raise UsageError(f"an iPhone has no option '{unknown[0]}'; it has {', '.join(sorted(OPTIONS))}")
        for key in ("team", "folder"):
            value = device.options.get(key, "")
            if value and not _PLAIN.fullmatch(value):
                raise UsageError(f"coremltools hands the option {key} to a shell as it is: '{value}' is not plain")
        self._options = device.options
        self._runner: asyncio.Runner | None = None
        self._temporary: TemporaryDirectory[str] | None = None
        self._phone: Any = None

    @property
    def name(self) -> str:
        """As it stands in records: "iphone NAME"."""
        return " ".join(filter(None, ("iphone", self._phone.name if self._phone else self._options.get("name", ""))))

    @property
    def machine(self) -> str:
        """The device itself."""
        return self.name

    def open(self) -> None:
        """Find the phone, build the app that runs models there, and start it. Raises RuntimeFailedError."""
        reason = missing()
        if reason:
            raise RuntimeFailedError(reason)
        remote = _module("remote_device")
        self._runner = asyncio.Runner()
        try:
            kinds = (remote.DeviceType.IPHONE, remote.DeviceType.IPAD)
            phone = self._chosen([found for kind in kinds for found in remote.Device.get_connected_devices(kind)])
            signing = remote.AppSigningCredentials(development_team=self._options.get("team", ""))
            self._phone = self._runner.run(phone.prepare_for_model_debugging(signing, self._folder()))
        except _failures() as error:
            self.close()
            remedy = "unlock it, switch its Developer Mode on, and see that the option team may sign apps in Xcode"
            raise RuntimeFailedError(f"the iPhone cannot be used: {excerpt(str(error))}; {remedy}") from None

    def units(self) -> Units:
        """Core ML's compute units; why not, where this is no Mac with Xcode, coremltools and a phone."""
        reason = "" if self._phone is not None else missing() or "the iPhone is not connected"
        return {RUNTIME: dict.fromkeys(UNITS, reason)}

    def run(self, job: Job, timeout: float) -> Reply:
        """Load and run every model of the bundle there; every failure is a reply with a status and a reason."""
        variant = job.variant
        if variant is None or job.kind != "measure":
            return Reply("unavailable", "coremltools' benchmarker runs models: no ceilings, and nothing for minutes")
        if variant.format != "coreml" or variant.unit not in UNITS:
            return Reply("unavailable", f"an iPhone runs Core ML bundles on {', '.join(UNITS)}; not {variant.label}")
        if self._phone is None or self._runner is None:
            return Reply("unavailable", self.units()[RUNTIME][variant.unit])
        try:
            return self._runner.run(asyncio.wait_for(_measured(variant, job.work, self._phone), timeout))
        except TimeoutError:
            return Reply("hung", f"the phone was left because it took more than {timeout:g} s")
        except VlmedgeError as error:
            return Reply("failed", str(error))
        except _failures() as error:
            return Reply("failed", excerpt(f"{type(error).__name__}: {error}"))

    def close(self) -> None:
        """Let go of the phone; the app stays on it."""
        if self._runner is not None:
            self._runner.close()
        if self._temporary is not None:
            self._temporary.cleanup()
        self._runner = self._phone = self._temporary = None

    # ---- inside -----------------------------------------------------------------------------------------------

    def _chosen(self, phones: list[Any]) -> Any:
        wanted = self._options.get("name")
        found = [phone for phone in phones if wanted in (None, phone.name, phone.udid)]
        if len(found) == 1:
            return found[0]
        names = ", ".join(sorted(phone.name for phone in phones)) or "none"
        raise RuntimeFailedError(
            f"one iPhone is needed, connected are: {names}; connect it by cable, unlock it, and give the option name"
        )

    def _folder(self) -> Path:
        """Where the app is built; models go through it to the phone too, so it stays until `close`."""
        if "folder" not in self._options:
            self._temporary = TemporaryDirectory(prefix="vlmedge-iphone-", ignore_cleanup_errors=True)
            return Path(self._temporary.name)
        folder = Path(self._options["folder"]).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def missing() -> str:
    """Why no iPhone can be reached from here, "" where one may be."""
    if platform.system() != "Darwin":
        return "an iPhone is reached from a Mac with Xcode only; run this there"
    try:
        _module("remote_device")
    except ImportError:
        return str(MissingExtraError("an iPhone", "coreml"))
    return ""


def packages(bundle: Bundle) -> dict[str, str]:
    """Each model of a bundle, an .mlpackage inside it, and the stage that a call of it is.

    A model of several components is the last one's in the order vision, projector, decoder. Raises RuntimeFailedError
    where there is none, or one that was compiled.
    """
    found: dict[str, str] = {}
    for component in bundle.manifest.components:
        for file in component.files:
            parts = Path(file).parts
            cut = next((i for i, part in enumerate(parts) if part.endswith((".mlpackage", ".mlmodelc"))), None)
            if cut is not None and component.name in _STAGES:
                found["/".join(parts[: cut + 1])] = _STAGES[component.name]
    compiled = [name for name in found if name.endswith(".mlmodelc")]
    if compiled or not found:
        what = f"{compiled[0]} is compiled" if compiled else "it has no .mlpackage"
        raise RuntimeFailedError(f"coremltools' benchmarker takes .mlpackage folders, of {bundle.path.name} {what}")
    return found


async def _measured(variant: Variant, work: Work, phone: Any) -> Reply:
    start = time.perf_counter()
    library, perf = importlib.import_module("coremltools"), _module("perf_utils")
    import_ms = (time.perf_counter() - start) * 1000
    unit = library.ComputeUnit[variant.unit.upper()]
    bundle = open_bundle(variant.source)
    load_ms: dict[str, float] = {}
    calls: dict[str, list[float]] = {}
    for package, stage in packages(bundle).items():
        model = library.models.MLModel(str(bundle.path / package), compute_units=unit, skip_model_load=True)
        benchmarker = perf.MLModelBenchmarker(model, phone)
        load_ms[package] = sum((await benchmarker.benchmark_load(iterations=1)).samples)
        calls[stage] = await _calls(benchmarker, work)
    facts = {
        "coremltools": library.__version__,
        "phone": {"name": phone.name, "system": f"{phone.os_version} ({phone.os_build_number})"},
        "load_ms": load_ms,
        "sample": "one call of each model, random inputs of its declared shapes",
        "agreement": NO_AGREEMENT,
    }
    load = Load(round(sum(load_ms.values()), 3), round(import_ms, 2), "")
    return Reply("ok", NO_AGREEMENT, load=load, samples=_samples(calls), environment=facts)


async def _calls(benchmarker: Any, work: Work) -> list[float]:
    """Milliseconds of at least `repeat` calls, and on until `min_seconds` are over."""
    out: list[float] = []
    end = time.perf_counter() + work.min_seconds
    while not out or time.perf_counter() < end:
        found = await benchmarker.benchmark_predict(iterations=work.repeat, warmup=not out and work.warmup > 0)
        out += found.samples
    return out


def _samples(calls: dict[str, list[float]]) -> tuple[Sample, ...]:
    """The n-th call of every model side by side, as many as all have; they did not run together, so `at` is 0."""
    rows = zip(*calls.values(), strict=False)
    return tuple(Sample(ASK, 0.0, {s: round(ms, 4) for s, ms in zip(calls, row, strict=True)}) for row in rows)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{_EXPERIMENTAL}.{name}")


def _failures() -> tuple[type[Exception], ...]:
    """What coremltools raises: for the phone's answers and for xcodebuild errors of its own that it does not export.

    AttributeError: `call_method` reads the answer that never came.
    """
    remote = _module("remote_device")
    phone = getattr(remote, "_DeviceCtlError", RuntimeError)
    build = getattr(getattr(remote, "_AppBuilder", None), "Error", RuntimeError)
    return (ValueError, TypeError, AttributeError, RuntimeError, OSError, phone, build)
