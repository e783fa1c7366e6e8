"""The iPhone host against a coremltools with the real one's signatures (9.0, see hosts/iphone.py); no phone here."""

from __future__ import annotations

import asyncio
import enum
import platform
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest

from vlmedge.bundle import open_bundle, write_manifest
from vlmedge.device_bench.device import Device
from vlmedge.device_bench.hosts.iphone import IphoneHost, packages
from vlmedge.device_bench.job import Ask, Job, Variant, Work
from vlmedge.errors import RuntimeFailedError, UsageError

WORK = Work("test", (Ask("a", "a.png", "", 1, 1, ""),), tokens=4, warmup=1, repeat=2)


class ComputeUnit(enum.Enum):
    ALL = 1
    CPU_AND_GPU = 2
    CPU_ONLY = 3
    CPU_AND_NE = 4


class DeviceType(enum.Enum):
    IPHONE = "iphone"
    IPAD = "ipad"


class DeviceCtlError(Exception):
    pass


class AppBuilder:
    class Error(Exception):
        pass


@dataclass(frozen=True)
class AppSigningCredentials:
    development_team: str | None = ""
    provisioning_profile_uuid: str | None = None
    bundle_identifier: str | None = None


@dataclass(frozen=True)
class Phone:
    name: str
    udid: str
    os_version: str = "19.1"
    os_build_number: str = "23B1"
    session: object = None

    connected = ()
    folders: ClassVar[list[Path]] = []

    @staticmethod
    def get_connected_devices(device_type):
        return list(Phone.connected) if device_type is DeviceType.IPHONE else []

    async def prepare_for_model_debugging(self, credentials=None, working_directory=None, clean=False):
        if not credentials.development_team:
            raise ValueError("xcodebuild: a development\nteam is needed")
        if credentials.development_team == "OTHER":
            raise AppBuilder.Error("[Error Code 65] None")
        assert working_directory.is_dir()
        Phone.folders.append(working_directory)
        return replace(self, session=credentials.development_team)


@dataclass
class MLModel:
    path: str
    compute_units: ComputeUnit
    skip_model_load: bool

    def __init__(
        self,
        model,
        is_temp_package=False,
        mil_program=None,
        skip_model_load=False,
        compute_units=ComputeUnit.ALL,
        weights_dir=None,
        function_name=None,
        optimization_hints=None,
    ) -> None:
        assert Path(model).is_dir()
        self.path, self.compute_units, self.skip_model_load = model, compute_units, skip_model_load


class MLModelBenchmarker:
    def __init__(self, model, device=None) -> None:
        assert device.session == "TEAM"
        assert model.compute_units is ComputeUnit.CPU_AND_NE
        assert model.skip_model_load  # it is loaded on the phone, not on the Mac
        self.model = model

    async def benchmark_load(self, iterations=1):
        return SimpleNamespace(samples=[100.0] * iterations)

    async def benchmark_predict(self, inputs=None, iterations=1, warmup=False):
        if "slow" in self.model.path:
            await asyncio.sleep(10)
        if "broken" in self.model.path:
            raise DeviceCtlError("the app is gone")
        first = 8.0 if "vision" in self.model.path else 2.0
        return SimpleNamespace(samples=[first + i for i in range(iterations)])


@pytest.fixture
def mac(monkeypatch):
    """A Mac with a phone, as far as coremltools tells."""
    experimental = "coremltools.models.ml_program.experimental"
    modules = {name: ModuleType(name) for name in ("coremltools", f"{experimental}.remote_device")}
    modules[f"{experimental}.perf_utils"] = ModuleType("perf_utils")
    for name in ("coremltools.models", "coremltools.models.ml_program", experimental):
        modules[name] = ModuleType(name)
    library, remote = modules["coremltools"], modules[f"{experimental}.remote_device"]
    library.ComputeUnit, library.models, library.__version__ = ComputeUnit, SimpleNamespace(MLModel=MLModel), "9.0"
    remote.Device, remote.DeviceType, remote._DeviceCtlError = Phone, DeviceType, DeviceCtlError
    remote._AppBuilder = AppBuilder
    remote.AppSigningCredentials = AppSigningCredentials
    modules[f"{experimental}.perf_utils"].MLModelBenchmarker = MLModelBenchmarker
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(Phone, "connected", (Phone("Ada's iPhone", "0001"),))


def host(**options: str) -> IphoneHost:
    return IphoneHost(Device("phone", "an iPhone", "iphone", options=options))


def coreml(bundle: Path, *names: str) -> Path:
    """A bundle whose components are these packages, one each."""
    found = open_bundle(bundle).manifest
    files = []
    for name in names:
        inner = f"{name}/Data/weights.bin"
        (bundle / inner).parent.mkdir(parents=True)
        (bundle / inner).write_bytes(b"12")
        files.append(replace(found.files[0], path=inner, bytes=2, sha256="", chunks=()))
    parts = [c for c in found.components if c.name in ("vision", "decoder")]
    components = tuple(replace(c, files=(f.path,)) for c, f in zip(parts, files, strict=False))
    changed = replace(found, format="coreml", components=components, files=(*found.files, *files))
    write_manifest(bundle, changed)
    return bundle


def job(bundle: Path, unit: str = "cpu_and_ne", format: str = "coreml") -> Job:
    variant = Variant("m", str(bundle), "d", format, "f16", 1, 16.0, "coreml", unit)
    return Job("measure", "phone", WORK, variant=variant)


def test_models_are_loaded_and_run_on_the_phone(mac, bundle_copy):
    bundle = coreml(bundle_copy, "vision.mlpackage", "decoder.mlpackage")
    phone = host(team="TEAM")
    assert phone.units()["coreml"]["all"] == "the iPhone is not connected"
    phone.open()
    assert phone.name == "iphone Ada's iPhone"
    assert phone.units() == {"coreml": dict.fromkeys(("all", "cpu_and_gpu", "cpu_and_ne", "cpu_only"), "")}
    reply = phone.run(job(bundle), 5)
    other = [phone.run(job(bundle, **what), 5).status for what in ({"unit": "cuda"}, {"format": "gguf"})]
    phone.close()
    assert reply.status == "ok"
    assert [(s.ask, s.ms) for s in reply.samples] == [
        ("random inputs", {"vision": 8.0, "decode": 2.0}),
        ("random inputs", {"vision": 9.0, "decode": 3.0}),
    ]
    assert reply.load.ms == 200.0
    assert reply.agreement is None
    assert "random inputs" in reply.reason
    assert reply.environment["phone"] == {"name": "Ada's iPhone", "system": "19.1 (23B1)"}
    assert other == ["unavailable", "unavailable"]
    assert phone.run(job(bundle), 5).status == "unavailable"


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("slow.mlpackage", "hung", "more than 0.2 s"),
        ("broken.mlpackage", "failed", "DeviceCtlError: the app is gone"),
        ("vision.mlmodelc", "failed", "vision.mlmodelc is compiled"),
    ],
)
def test_models_that_do_not_run(mac, bundle_copy, name, status, reason):
    phone = host(team="TEAM")
    phone.open()
    reply = phone.run(job(coreml(bundle_copy, name)), 0.2)
    phone.close()
    assert reply.status == status
    assert reason in reply.reason


def test_which_phone(mac, monkeypatch):
    with pytest.raises(RuntimeFailedError, match=r"cannot be used: xcodebuild: a development team is needed; unlock"):
        host().open()
    with pytest.raises(RuntimeFailedError, match=r"cannot be used: \[Error Code 65\] None; unlock it"):
        host(team="OTHER").open()
    monkeypatch.setattr(Phone, "connected", (Phone("Ada's", "0001"), Phone("Bo's", "0002")))
    with pytest.raises(RuntimeFailedError, match="connected are: Ada's, Bo's; connect it by cable"):
        host(team="TEAM").open()
    phone = host(team="TEAM", name="0002")
    phone.open()
    assert phone.name == "iphone Bo's"
    assert Phone.folders[-1].is_dir()
    phone.close()
    assert not Phone.folders[-1].exists()


def test_elsewhere_it_says_what_is_needed(bundle, monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    phone = host()
    assert set(phone.units()["coreml"].values()) == {"an iPhone is reached from a Mac with Xcode only; run this there"}
    with pytest.raises(RuntimeFailedError, match="from a Mac with Xcode only"):
        phone.open()
    assert phone.run(job(bundle), 1).status == "unavailable"
    with pytest.raises(UsageError, match="no option 'serial'; it has folder, name, team"):
        host(serial="1")
    with pytest.raises(UsageError, match="to a shell as it is: '/a b' is not plain"):
        host(folder="/a b")
    with pytest.raises(RuntimeFailedError, match=r"it has no \.mlpackage"):
        packages(open_bundle(bundle))
