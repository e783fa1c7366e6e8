"""Where something was measured: processor, memory, system, versions. Facts for reading; no names of hosts or users."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import vlmedge
from vlmedge.device_bench.nvml import load_nvml
from vlmedge.device_bench.system_file import number, text
from vlmedge.runtimes.cores import physical_cores

PACKAGES = (
    "coremltools",
    "gguf",
    "llama-cpp-python",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-directml",
    "onnxruntime-gpu",
    "pillow",
    "tokenizers",
    "torch",
)
# What products and attention are made of: x86 (/proc/cpuinfo), Arm (hwcaps, and Apple's hw.optional.arm.*).
_FLAGS = """
    avx avx2 fma f16c avx_vnni avx512f avx512bw avx512vl avx512_vnni avx512_bf16 avx512_fp16 amx_tile amx_int8 amx_bf16
    asimd asimdhp asimddp i8mm bf16 sve sve2 svei8mm svebf16 sme sme2
    FEAT_FP16 FEAT_DotProd FEAT_I8MM FEAT_BF16 FEAT_SME FEAT_SME2
"""
FLAGS = frozenset(_FLAGS.split())
ROOT = Path("/")
_PATIENCE = 10.0  # seconds for git, sysctl


def environment(root: Path = ROOT) -> dict[str, Any]:
    """All that is known, as JSON data; what a system does not tell is absent. `root`: where /proc and /sys are."""
    facts: dict[str, Any] = {
        "cpu": cpu_model(root),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "physical_cores": physical_cores(),
        "flags": sorted(cpu_flags(root)),
        "affinity": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "gpus": _gpus(),
        "ram_mb": _mb(ram_bytes(root)),
        "available_mb": _mb(_memory_info(root).get("MemAvailable")),
        "load": [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "system": _system(root),
        "kernel": f"{platform.system()} {platform.release()}",
        "virtual": _virtual(root),
        "python": platform.python_version(),
        "vlmedge": vlmedge.__version__,
        "packages": _packages(),
    }
    facts |= dict(_governing(root)) | {"temperatures": _temperatures(root)} | _commit(Path(vlmedge.__file__).parent)
    return {name: value for name, value in facts.items() if value not in (None, "", {}, [])}


def cpu_model(root: Path = ROOT) -> str:
    """The processor's name; of boards with Arm's the board's, which says which it is."""
    info = _cpu_info(root)
    board = text(root / "proc/device-tree/model").strip("\0")
    found = info.get("model name") or board or info.get("Hardware") or _sysctl("machdep.cpu.brand_string")
    return found or os.environ.get("PROCESSOR_IDENTIFIER", "") or platform.processor() or platform.machine()


def cpu_flags(root: Path = ROOT) -> frozenset[str]:
    """Those of `FLAGS` that the processor has; empty where the system does not tell (Windows)."""
    info = _cpu_info(root)
    words = (info.get("flags") or info.get("Features") or "").split()
    if sys.platform == "darwin":
        words += [name for name in FLAGS if name.startswith("FEAT_") and _sysctl(f"hw.optional.arm.{name}") == "1"]
        words += _sysctl("machdep.cpu.leaf7_features").lower().split()
    return FLAGS.intersection(words)


def ram_bytes(root: Path = ROOT) -> int | None:
    """Memory of the machine, or of the container where it may use less; None where the system does not tell."""
    groups = ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes")  # cgroup v2, v1
    limits = [_memory_info(root).get("MemTotal"), *(number(root / group) for group in groups)]
    known = [limit for limit in limits if limit]
    if known:
        return min(known)
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    load = getattr(ctypes, "WinDLL", None)
    return windows_ram(load("kernel32")) if load else None


class _MemoryStatus(ctypes.Structure):
    """`MEMORYSTATUSEX` of sysinfoapi.h."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("physical", ctypes.c_uint64),
        ("others", ctypes.c_uint64 * 6),
    )


def windows_ram(kernel: Any) -> int | None:
    """Bytes of memory by `GlobalMemoryStatusEx`."""
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    return int(status.physical) if kernel.GlobalMemoryStatusEx(ctypes.byref(status)) else None


def _cpu_info(root: Path) -> dict[str, str]:
    """The first of everything in /proc/cpuinfo."""
    lines = (line.partition(":") for line in text(root / "proc/cpuinfo").splitlines())
    found: dict[str, str] = {}
    for name, _, value in lines:
        found.setdefault(name.strip(), value.strip())
    return found


def _memory_info(root: Path) -> dict[str, int]:
    """/proc/meminfo in bytes."""
    lines = (line.partition(":") for line in text(root / "proc/meminfo").splitlines() if line.endswith(" kB"))
    return {name: 1024 * int(value.split()[0]) for name, _, value in lines}


def _governing(root: Path) -> Iterator[tuple[str, Any]]:
    """What decides about clocks and pages. Frequencies by policy: MHz now, least, most (cpufreq's files have kHz)."""
    policies = sorted((root / "sys/devices/system/cpu/cpufreq").glob("policy*"))
    yield "governor", ", ".join(sorted({text(p / "scaling_governor") for p in policies} - {""}))
    files = ("scaling_cur_freq", "scaling_min_freq", "scaling_max_freq")
    clocks = {p.name: [number(p / file) for file in files] for p in policies}
    yield "mhz", {name: [v and v // 1000 for v in values] for name, values in clocks.items() if any(values)}
    yield "huge_pages", _chosen(text(root / "sys/kernel/mm/transparent_hugepage/enabled"))


def _temperatures(root: Path) -> dict[str, float]:
    """Degrees Celsius by sensor, the warmest of equal names (thermal_zone's `temp` is in thousandths)."""
    found: dict[str, float] = {}
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        value, name = number(zone / "temp"), text(zone / "type") or zone.name
        if value is not None:
            found[name] = max(found.get(name, -273.0), value / 1000)
    return found


def _virtual(root: Path) -> str:
    """What stands between the system and the processor, as far as it shows itself."""
    flags = (_cpu_info(root).get("flags") or "").split()
    words = [text(root / "sys/class/dmi/id/product_name") or "a hypervisor"] if "hypervisor" in flags else []
    if (root / ".dockerenv").exists() or (root / "run/.containerenv").exists():
        words.append("a container")
    return ", ".join(words)


def _system(root: Path) -> str:
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    if sys.platform == "win32":
        return f"Windows {platform.version()}"
    lines = (line.partition("=") for line in text(root / "etc/os-release").splitlines())
    names = {name: value.strip('"') for name, _, value in lines}
    return names.get("PRETTY_NAME", "") or platform.system()


def _gpus() -> list[str]:
    """NVIDIA's, as CUDA programs see them; other GPUs are named by the runtimes that use them."""
    nvml = load_nvml()
    return [] if isinstance(nvml, str) else [nvml.name(gpu) for gpu in nvml.gpus()]


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit(folder: Path) -> dict[str, Any]:
    """The commit of a checkout that this package is run from, and whether files differ from it."""
    if _run("git", "-C", str(folder), "ls-files", "--error-unmatch", "__init__.py") is None:
        return {}  # installed, perhaps into a folder of someone else's repository
    changed = _run("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return {"commit": _run("git", "-C", str(folder), "rev-parse", "HEAD"), "dirty": bool(changed)}


def _sysctl(name: str) -> str:
    return (_run("sysctl", "-n", name) or "") if sys.platform == "darwin" else ""


def _run(*command: str) -> str | None:
    """What a command prints; None where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_PATIENCE)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _chosen(text: str) -> str:
    """Of `always [madvise] never` the one in brackets."""
    return text.partition("[")[2].partition("]")[0]


def _mb(size: int | None) -> int | None:
    return None if size is None else size // 1_000_000
