"""NVIDIA GPUs: the driver's energy counter, and beside it the processor packages where they can be read."""

from __future__ import annotations

from collections.abc import Callable

from vlmedge.device_bench.energy import rapl
from vlmedge.device_bench.energy.meter import COUNTED, Counted, Meter, Register, Together, Watched
from vlmedge.device_bench.nvml import Gpu, Nvml, load_nvml
from vlmedge.errors import RuntimeFailedError


def find(
    load: Callable[[], Nvml | str] = load_nvml, find_packages: Callable[[], Meter | str] = rapl.find
) -> Meter | str:
    """The visible GPUs' counters (mJ; Volta and newer); why they cannot be read; "" where there is no such GPU."""
    nvml = load()
    if isinstance(nvml, str):
        return nvml
    gpus = nvml.gpus()
    if not gpus:
        return ""
    if any(nvml.millijoules(gpu) is None for gpu in gpus):
        return "this NVIDIA GPU counts no energy: that came with Volta"
    count = f"{len(gpus)} GPUs" if len(gpus) > 1 else "GPU"
    meter = Watched(f"nvml: {count}", Counted([_register(nvml, gpu) for gpu in gpus]), COUNTED)
    packages = find_packages()
    return meter if isinstance(packages, str) else Together((meter, packages))


def _register(nvml: Nvml, gpu: Gpu) -> Register:
    def read() -> int:
        value = nvml.millijoules(gpu)
        if value is None:
            raise RuntimeFailedError("the GPU's energy counter stopped answering; run nvidia-smi")
        return value

    return Register(read, 1e-3)
