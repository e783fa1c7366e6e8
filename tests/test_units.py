"""The unit that computes: declared by every runtime, taken as it was asked for or refused, never replaced.

Nothing but a CPU runs these tests, so what GPUs answer is said by fakes at the libraries' boundary.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import vlmedge
from vlmedge.bundle import open_bundle
from vlmedge.errors import BundleError, RuntimeFailedError
from vlmedge.pipeline import export
from vlmedge.reference.precision import full_float32
from vlmedge.runtimes import RUNTIMES
from vlmedge.runtimes.ggml_library import GgmlTensor
from vlmedge.runtimes.llamacpp_decoder import Decoder
from vlmedge.runtimes.llamacpp_native import load_native
from vlmedge.runtimes.llamacpp_session import LlamaCppSession, text_file
from vlmedge.runtimes.llamacpp_tap import TowerTap
from vlmedge.runtimes.llamacpp_units import Device, choose_device, devices, units_of
from vlmedge.runtimes.llamacpp_vision import VisionTower


@pytest.fixture(scope="module")
def onnx(tmp_path_factory, golden):
    """The golden checkpoint as ONNX."""
    out = tmp_path_factory.mktemp("units") / "golden.onnx"
    return export(golden, "onnx", "f32", out, verify=False, threads=1).path


@pytest.fixture
def sources(golden, bundle, onnx) -> dict[str, Any]:
    return {"torch": golden, "llamacpp": bundle, "onnxruntime": onnx}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_exactly_the_unit_or_one_line(runtime, sources, photo, refused, succeed):
    units = RUNTIMES[runtime].units()
    assert units["cpu"] == ""
    assert all(name == name.lower() and "\n" not in why for name, why in units.items())
    for absent in (name for name, why in units.items() if why):
        line = refused("run", sources[runtime], photo, "What?", "--provider", absent, code=1)
        assert f"the runtime '{runtime}' cannot compute on '{absent}' here: {units[absent]}" in line
    line = refused("run", sources[runtime], photo, "What?", "--provider", "cpux", code=2)
    assert f"the runtime '{runtime}' has no unit 'cpux'; did you mean 'cpu'?" in line
    ran = succeed("run", sources[runtime], photo, "What?", "--provider", "CPU", "--max-tokens", 1, "--json").data
    assert ran["session"]["unit"] == "cpu"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_units_of_a_package_that_is_not_installed(runtime, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    units = RUNTIMES[runtime].units()
    assert {"cpu", "cuda"} <= set(units)
    assert all("is not installed: " in why for why in units.values())


def test_doctor_lists_units(succeed):
    found = succeed("doctor", "--json").data["units"]
    assert {name: units["cpu"] for name, units in found.items()} == dict.fromkeys(RUNTIMES, "")
    assert "why not, and what to do" in succeed("doctor").out


def test_torch_units(monkeypatch, golden):
    def units() -> Any:
        return RUNTIMES["torch"].units()

    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert units()["mps"] == ""
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    assert "finds no GPU (the driver shows no GPU to this process)" in units()["cuda"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert units()["cuda"] == ""
    if not torch.backends.cuda.is_built():  # a promise that does not hold is an error, not the CPU
        with pytest.raises(AssertionError, match="not compiled with CUDA"):
            vlmedge.load(golden, provider="cuda")


@pytest.mark.parametrize("caller", ["highest", "high"])
def test_float32_is_float32_on_cuda_and_the_callers_choice_comes_back(caller):
    def chosen() -> tuple[Any, ...]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    torch.set_float32_matmul_precision(caller)
    try:
        with full_float32(torch.device("cuda")):
            assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert chosen() == (caller, True)
        with full_float32(torch.device("cpu")):
            assert chosen() == (caller, True)
    finally:
        torch.set_float32_matmul_precision("highest")


class FakeGgml:
    """A ggml with these devices: (kind, registry, name); a handle is the number of the device, from 1 on."""

    def __init__(self, *found: tuple[int, str, str]) -> None:
        self.found = found

    def backend_dev_count(self) -> int:
        return len(self.found)

    def backend_dev_get(self, index: int) -> int:
        return index + 1

    def backend_dev_type(self, handle: int) -> int:
        return self.found[handle - 1][0]

    def backend_dev_backend_reg(self, handle: int) -> int:
        return handle

    def backend_reg_name(self, handle: int) -> bytes:
        return self.found[handle - 1][1].encode()

    def backend_dev_name(self, handle: int) -> bytes:
        return self.found[handle - 1][2].encode()

    def backend_dev_description(self, handle: int) -> bytes:
        return b"a device"


def test_llamacpp_devices():
    ggml: Any = FakeGgml(
        (0, "CPU", "CPU"), (3, "BLAS", "BLAS"), (2, "Vulkan", "Vulkan0"), (1, "MTL", "MTL0"), (1, "CUDA", "CUDA0"),
        (1, "CUDA", "CUDA1"),
    )  # fmt: skip
    found = devices(ggml)
    assert [(d.unit, d.handle) for d in found] == [("metal", 4), ("cuda", 5), ("cuda", 6), ("vulkan", 3)]
    assert units_of(found, offloads=True) == dict.fromkeys(("cpu", "cuda", "metal", "vulkan"), "")
    chosen = choose_device(found, True, "CUDA")
    assert chosen == Device("cuda", "CUDA0", "a device", 5)
    assert list(chosen.listed()) == [5, None]
    assert choose_device(found, True, None) is choose_device(found, True, "cpu") is None
    with pytest.raises(RuntimeFailedError, match=r"'cuda' here: .*computes on the CPU only.*-DGGML_CUDA=on"):
        choose_device([], False, "cuda")
    with pytest.raises(RuntimeFailedError, match=r"'vulkan' here: .* finds no such device"):
        choose_device([found[1]], True, "vulkan")


class Recording:
    """Bindings that keep the parameters they are given, and compute on the CPU whatever those say."""

    def __init__(self, bindings: Any) -> None:
        self.bindings, self.params = bindings, SimpleNamespace()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bindings, name)

    def llama_model_load_from_file(self, path: bytes, params: Any) -> Any:
        listed = ctypes.cast(params.devices, ctypes.POINTER(ctypes.c_void_p))
        self.params.devices, self.params.layers = listed[0], params.n_gpu_layers
        params.devices, params.n_gpu_layers = None, 0
        return self.bindings.llama_model_load_from_file(path, params)

    def llama_init_from_model(self, model: Any, params: Any) -> Any:
        self.params.offloads = (params.offload_kqv, params.op_offload, params.flash_attn_type)
        params.offload_kqv = params.op_offload = params.flash_attn_type = 0
        return self.bindings.llama_init_from_model(model, params)

    def mtmd_init_from_file(self, path: bytes, model: Any, params: Any) -> None:
        self.params.tower = (params.use_gpu, params.device)


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (None, (None, 0, (False, False, 0), (False, None))),
        (Device("cuda", "CPU", "", 77), (77, -1, (True, True, -1), (True, 77))),  # a name that the log will confirm
    ],
)
def test_what_llamacpp_is_told(bundle, device, expected):
    native, spec = load_native(), open_bundle(bundle).manifest.model
    llama = Recording(native.llama)
    recorded = replace(native, llama=llama, mtmd=Recording(native.mtmd))
    decoder = Decoder(
        recorded, text_file(bundle), spec.decoder, threads=1, memory="fast", kv_type="f16", batch=64, device=device
    )
    with pytest.raises(BundleError):
        VisionTower(recorded, bundle / "mmproj.gguf", decoder.model, spec.vision, 1, device)
    decoder.close()
    assert (llama.params.devices, llama.params.layers, llama.params.offloads, recorded.mtmd.params.tower) == expected


def test_weights_that_llamacpp_put_elsewhere_are_an_error(bundle):
    native, spec = load_native(), open_bundle(bundle).manifest.model
    recorded = replace(native, llama=Recording(native.llama))
    with pytest.raises(RuntimeFailedError, match=r"was to run on CUDA0 \(cuda\), but llama.cpp put .* into CPU"):
        Decoder(
            recorded, text_file(bundle), spec.decoder, threads=1, memory="fast", kv_type="f16", batch=64,
            device=Device("cuda", "CUDA0", "", 77),
        )  # fmt: skip


def test_llamacpp_says_where_the_weights_are(bundle):
    session = LlamaCppSession(open_bundle(bundle).manifest.model, bundle, threads=1)
    facts = session.info()
    session.close()
    assert (facts["unit"], facts["device"], set(facts["computes"].values())) == ("cpu", "cpu", {"cpu"})
    assert all(name.startswith("CPU") and size > 0 for name, size in facts["weights_mib"].items())
    assert facts["weights_mib"]


@pytest.mark.parametrize(
    ("name", "known"),
    [(b"patches", True), (b"CUDA0#patches#0", True), (b"patches (view)", False), (b"CUDA0#positions#0", False)],
)
def test_the_towers_rows_are_found_on_a_gpu_too(name, known):
    source, node = GgmlTensor(name=name), GgmlTensor()
    node.src[1] = ctypes.addressof(source)
    assert TowerTap(load_native())._on_node(ctypes.addressof(node), True, None) is known
