"""This process's memory: what is resident, of which kind, the highest so far; and what it takes of a GPU.

Everything is in MB (10^6 bytes), and None where the system does not tell.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from vlmedge.device_bench.nvml import Nvml, load_nvml
from vlmedge.measure import peak_rss_mb

MB = 1e6


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes. `anonymous`: what the system cannot drop; `mapped`: pages of files, which it can read again."""

    resident: float | None = None
    peak: float | None = None
    anonymous: float | None = None
    mapped: float | None = None


class System(Protocol):
    """How one operating system is asked."""

    def usage(self) -> Usage:
        """What it says now."""

    def reset_peak(self) -> bool:
        """Let the peak begin anew at what is resident now; False where that cannot be done."""


class LinuxMemory:
    """`/proc/self/status` and `clear_refs` (Documentation/filesystems/proc.rst); also Android's."""

    def __init__(self, process: Path = Path("/proc/self")) -> None:
        self._process = process

    def usage(self) -> Usage:
        """VmRSS and VmHWM; RssAnon with RssShmem, and RssFile: Linux 4.5 and newer."""
        try:
            text = (self._process / "status").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return Usage()
        lines = (line.partition(":") for line in text.splitlines() if line.endswith(" kB"))
        values = {name: 1024.0 * int(rest.split()[0]) for name, _, rest in lines}
        anonymous = values.get("RssAnon")
        if anonymous is not None:
            anonymous += values.get("RssShmem", 0.0)
        return Usage(values.get("VmRSS"), values.get("VmHWM"), anonymous, values.get("RssFile"))

    def reset_peak(self) -> bool:
        """Write 5 to `clear_refs`: "reset the peak resident set size to the process's current one" (since 4.0).

        Containers and kernels without CONFIG_PROC_PAGE_MONITOR may not permit it.
        """
        try:
            with (self._process / "clear_refs").open("r+", encoding="ascii") as file:  # not to be created
                file.write("5")
        except OSError:
            return False
        return True


class _RusageV4(ctypes.Structure):
    """`struct rusage_info_v4`, bsd/sys/resource.h of xnu: a UUID and 35 counters of 64 bits."""

    _fields_ = (
        ("uuid", ctypes.c_uint8 * 16),
        ("times_and_wakeups", ctypes.c_uint64 * 5),
        ("wired_size", ctypes.c_uint64),
        ("resident_size", ctypes.c_uint64),
        ("phys_footprint", ctypes.c_uint64),
        ("up_to_logical_writes", ctypes.c_uint64 * 20),
        ("lifetime_max_phys_footprint", ctypes.c_uint64),
        ("instructions_to_serviced_energy", ctypes.c_uint64 * 4),
        ("interval_max_phys_footprint", ctypes.c_uint64),
        ("runnable_time", ctypes.c_uint64),
    )


class MacMemory:
    """`proc_pid_rusage`: the footprint, which is what macOS charges a process with and ends it for.

    So pages of mapped files are not in `resident` and `peak` there; `mapped` is what else is resident.
    """

    _FLAVOUR = 4  # RUSAGE_INFO_V4

    def __init__(self, library: Any = None) -> None:
        self._library = ctypes.CDLL(None) if library is None else library
        self._was_reset = False

    def usage(self) -> Usage:
        """The footprint, its highest since the last reset (or ever), and what is resident beside it."""
        found = _RusageV4()
        if self._library.proc_pid_rusage(os.getpid(), self._FLAVOUR, ctypes.byref(found)):
            return Usage()
        now, beside = float(found.phys_footprint), max(0.0, float(found.resident_size) - float(found.phys_footprint))
        peak = found.interval_max_phys_footprint if self._was_reset else found.lifetime_max_phys_footprint
        return Usage(now, float(max(peak, now)), now, beside)

    def reset_peak(self) -> bool:
        """`proc_reset_footprint_interval` of libproc, macOS 10.14 and newer."""
        reset: Callable[[int], int] | None = getattr(self._library, "proc_reset_footprint_interval", None)
        self._was_reset = self._was_reset or (reset is not None and reset(os.getpid()) == 0)
        return self._was_reset


class _Counters(ctypes.Structure):
    """`PROCESS_MEMORY_COUNTERS_EX2` of psapi.h; its first part is `PROCESS_MEMORY_COUNTERS_EX`."""

    _fields_ = (
        ("cb", ctypes.c_uint32),
        ("faults", ctypes.c_uint32),
        ("peak_working_set", ctypes.c_size_t),
        ("working_set", ctypes.c_size_t),
        ("quotas", ctypes.c_size_t * 4),
        ("page_file", ctypes.c_size_t),
        ("peak_page_file", ctypes.c_size_t),
        ("private_usage", ctypes.c_size_t),
        ("private_working_set", ctypes.c_size_t),
        ("shared_commit", ctypes.c_uint64),
    )


class WindowsMemory:
    """`GetProcessMemoryInfo`; what is private of the working set is told by Windows 10 22H2 and newer only."""

    def __init__(self, kernel: Any = None) -> None:
        if kernel is None:
            kernel = getattr(ctypes, "WinDLL", ctypes.CDLL)("kernel32")
            kernel.GetCurrentProcess.restype = ctypes.c_void_p
            kernel.K32GetProcessMemoryInfo.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32)
        self._kernel = kernel

    def usage(self) -> Usage:
        """The working set, its highest, and its private part."""
        found, process = _Counters(), self._kernel.GetCurrentProcess()
        for size in (ctypes.sizeof(_Counters), _Counters.private_working_set.offset):
            found.cb = size
            if self._kernel.K32GetProcessMemoryInfo(process, ctypes.byref(found), size):
                now, private = float(found.working_set), float(found.private_working_set)
                split = (private, max(0.0, now - private)) if size == ctypes.sizeof(_Counters) else (None, None)
                return Usage(now, float(found.peak_working_set), *split)
        return Usage()

    def reset_peak(self) -> bool:
        """Windows keeps the peak of a whole life."""
        return False


class OtherMemory:
    """Any other system: `getrusage` knows the peak."""

    def usage(self) -> Usage:
        """The peak."""
        peak = peak_rss_mb()
        return Usage(peak=None if peak is None else peak * MB)

    def reset_peak(self) -> bool:
        """It cannot."""
        return False


SYSTEMS: dict[str, Callable[[], System]] = {
    "linux": LinuxMemory,
    "android": LinuxMemory,  # what Python 3.13 calls it there
    "darwin": MacMemory,
    "ios": MacMemory,
    "win32": WindowsMemory,
}


def resident_mb() -> float | None:
    """What is in memory now; on Macs the footprint, see MacMemory."""
    return _mb(_system().usage().resident)


def split_mb() -> tuple[float | None, float | None]:
    """Anonymous memory and pages of files, now."""
    usage = _system().usage()
    return _mb(usage.anonymous), _mb(usage.mapped)


def peak_mb() -> float | None:
    """The highest since `reset_peak` where that worked, else of the process's whole life."""
    return _mb(_system().usage().peak)


def reset_peak() -> bool:
    """Let the peak begin anew; False where the system cannot, and the peak stays that of the whole life."""
    return _system().reset_peak()


def gpu_peak_mb() -> float | None:
    """Memory of GPUs: the larger of PyTorch's own peak and what NVIDIA's driver says of this process now.

    Native runtimes keep what they once took, so for them the driver's word at the end is close to the peak; it knows
    no processes of containers with their own process numbers. None where the process uses no GPU. It loads the driver's
    library: ask when all else is measured.
    """
    nvml = load_nvml()
    taken = max(_torch_bytes(sys.modules.get("torch")), 0 if isinstance(nvml, str) else _nvml_bytes(nvml))
    return taken / MB if taken else None


def _torch_bytes(torch: Any) -> int:
    """What PyTorch's allocators reserved at most (CUDA), or hold (Metal has no peak); 0 where it is not imported."""
    if torch is None:
        return 0
    cuda = torch.cuda
    peak = sum(cuda.max_memory_reserved(i) for i in range(cuda.device_count())) if cuda.is_initialized() else 0
    return int(peak or (torch.mps.driver_allocated_memory() if torch.backends.mps.is_available() else 0))


def _nvml_bytes(nvml: Nvml) -> int:
    return sum(nvml.process_bytes(gpu, os.getpid()) for gpu in nvml.gpus())


@lru_cache(maxsize=1)
def _system() -> System:
    return SYSTEMS.get(sys.platform, OtherMemory)()


def _mb(value: float | None) -> float | None:
    return None if value is None else value / MB
