"""What the installed llama.cpp can compute on here: the CPU, and the devices that its ggml was built with and finds."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vlmedge.runtimes.ggml_library import Ggml
from vlmedge.runtimes.units import CPU, check_unit

_GPU, _INTEGRATED = 1, 2  # ggml_backend_dev_type; 0 is the CPU, 3 accelerators that work for it (BLAS, AMX)
_UNITS = {"mtl": "metal"}  # ggml's name of a registry -> ours, where lower case is not enough
_BUILT_WITH = {"cuda": "-DGGML_CUDA=on", "metal": "-DGGML_METAL=on", "vulkan": "-DGGML_VULKAN=on"}


@dataclass(frozen=True, slots=True)
class Device:
    """One device of ggml: its unit, ggml's name ("CUDA0") and description of it, and the handle for native calls."""

    unit: str
    name: str
    description: str
    handle: int

    def listed(self) -> ctypes.Array[ctypes.c_void_p]:
        """A list for `llama_model_params.devices`: this device and the end; whoever passes it on keeps it alive."""
        return (ctypes.c_void_p * 2)(self.handle, None)


def usual_units() -> tuple[str, ...]:
    """The names that are known without asking ggml."""
    return (CPU, *_BUILT_WITH)


def devices(ggml: Ggml) -> list[Device]:
    """The GPUs, those with memory of their own first, in ggml's order."""
    found: dict[int, list[Device]] = {_GPU: [], _INTEGRATED: []}
    for index in range(ggml.backend_dev_count()):
        handle = ggml.backend_dev_get(index)
        kind = ggml.backend_dev_type(handle)
        if kind in found:
            found[kind].append(_device(ggml, handle))
    return [*found[_GPU], *found[_INTEGRATED]]


def units_of(found: Iterable[Device], offloads: bool) -> Mapping[str, str]:
    """See `runtimes.Runtime.units`. `offloads`: whether this build computes on anything but the CPU."""
    here = dict.fromkeys((device.unit for device in found), "")
    return {CPU: ""} | {name: _why_not(name, offloads) for name in _BUILT_WITH} | here


def choose_device(found: Iterable[Device], offloads: bool, wanted: str | None) -> Device | None:
    """The first device of the unit that is wanted, None for the CPU; raises as `check_unit` does."""
    found = list(found)
    unit = CPU if wanted is None else check_unit("llamacpp", wanted, units_of(found, offloads))
    return next((device for device in found if device.unit == unit), None)


def _device(ggml: Ggml, handle: int) -> Device:
    registry = ggml.backend_reg_name(ggml.backend_dev_backend_reg(handle)).decode().lower()
    name, description = ggml.backend_dev_name(handle).decode(), ggml.backend_dev_description(handle).decode()
    return Device(_UNITS.get(registry, registry), name, description, handle)


def _why_not(name: str, offloads: bool) -> str:
    if name == "metal" and platform.system() != "Darwin":
        return "Metal is there on Macs only: use another unit"
    rebuild = (
        f'CMAKE_ARGS="{_BUILT_WITH[name]}" pip install --no-cache-dir --force-reinstall --no-binary llama-cpp-python '
        "llama-cpp-python"
    )
    if offloads:
        return f"this build of llama-cpp-python finds no such device; if there is one, build it anew: {rebuild}"
    return f"this build of llama-cpp-python computes on the CPU only; build it anew: {rebuild}"
