"""NVIDIA's management library, as far as the benchmark asks it: which GPUs, their energy, a process's memory."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeAlias

Gpu: TypeAlias = Any  # nvmlDevice_t, an opaque pointer
_MOST_PROCESSES = 256
_LONGEST_NAME = 96  # NVML_DEVICE_NAME_V2_BUFFER_SIZE
_NOT_AVAILABLE = (1 << 64) - 1  # NVML_VALUE_NOT_AVAILABLE


class _Process(ctypes.Structure):
    """`nvmlProcessInfo_t` of nvml.h, version 2."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class Nvml:
    """The opened library. Names and units are those of nvml.h (docs.nvidia.com/deploy/nvml-api)."""

    def __init__(self, library: Any, environ: Mapping[str, str] = os.environ) -> None:
        self._library, self._environ = library, environ

    def gpus(self) -> tuple[Gpu, ...]:
        """The GPUs that CUDA programs see here: those of CUDA_VISIBLE_DEVICES, else all."""
        names = self._environ.get("CUDA_VISIBLE_DEVICES")
        if names is None:
            count = ctypes.c_uint()
            self._library.nvmlDeviceGetCount_v2(ctypes.byref(count))
            names = ",".join(map(str, range(count.value)))
        found = (self._gpu(name.strip()) for name in names.split(",") if name.strip())
        return tuple(gpu for gpu in found if gpu is not None)

    def _gpu(self, name: str) -> Gpu | None:
        gpu = ctypes.c_void_p()
        if name.isdigit():
            code = self._library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(name)), ctypes.byref(gpu))
        else:
            code = self._library.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(gpu))
        return None if code else gpu

    def name(self, gpu: Gpu) -> str:
        """The product's name, "" where the driver does not tell."""
        text = ctypes.create_string_buffer(_LONGEST_NAME)
        code = self._library.nvmlDeviceGetName(gpu, text, ctypes.c_uint(_LONGEST_NAME))
        return "" if code else text.value.decode(errors="replace")

    def millijoules(self, gpu: Gpu) -> int | None:
        """`nvmlDeviceGetTotalEnergyConsumption`: mJ since the driver was loaded; None before Volta."""
        total = ctypes.c_ulonglong()
        code = self._library.nvmlDeviceGetTotalEnergyConsumption(gpu, ctypes.byref(total))
        return None if code else total.value

    def process_bytes(self, gpu: Gpu, pid: int) -> int:
        """What a process holds of the GPU's memory, 0 where the driver does not tell or know it."""
        list_processes = getattr(self._library, "nvmlDeviceGetComputeRunningProcesses_v3", None)
        if list_processes is None:  # before driver 510
            return 0
        count, found = ctypes.c_uint(_MOST_PROCESSES), (_Process * _MOST_PROCESSES)()
        if list_processes(gpu, ctypes.byref(count), found):
            return 0
        return sum(p.used for p in found[: count.value] if p.pid == pid and p.used != _NOT_AVAILABLE)


@lru_cache(maxsize=1)
def load_nvml() -> Nvml | str:
    """Open the driver's library; "" where there is none, or why it does not answer."""
    name = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
    try:
        library = ctypes.CDLL(name)
    except OSError:
        return ""
    return opened(library)


def opened(library: Any) -> Nvml | str:
    """Initialise it: the NVML, or why it does not answer."""
    code = library.nvmlInit_v2()
    return f"NVIDIA's driver does not answer (nvmlInit: {code}); run nvidia-smi" if code else Nvml(library)
