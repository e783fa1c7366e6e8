"""Does the installed llama.cpp survive this machine's processor? Asked once, in a child process.

On processors with AMX, llama-cpp-python as pip builds it dies in the first product with more than one row
(llama.cpp issue 20824; gcc drops stores into the tile configuration). `python -m vlmedge.runtimes.llamacpp_probe` is
the child: it multiplies quantized matrices in every layout that llama.cpp would choose, and compares the results.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlmedge.errors import RuntimeFailedError
from vlmedge.runtimes.cache import cache_folder
from vlmedge.runtimes.ggml_library import TYPE_F32, Ggml, GgmlTensor
from vlmedge.session import F32, U8

FLAGS = 'CXXFLAGS="-fno-tree-dse -fno-dse"'
REBUILD = f"{FLAGS} pip install --no-cache-dir --force-reinstall --no-binary llama-cpp-python llama-cpp-python"
CHILD = (sys.executable, "-m", "vlmedge.runtimes.llamacpp_probe")
_FINE = "fine"
_TYPES = {"Q4_0": 2, "Q8_0": 8, "Q4_K": 12, "Q6_K": 14}
_ROWS, _COLUMNS, _COUNT = 256, 512, 64


def check(command: Sequence[str] = CHILD, cache: Path | None = None) -> None:
    """Raise RuntimeFailedError if llama.cpp crashes or errs here; runs `command` where `cache` does not know yet.

    `cache`: the folder for results, by default vlmedge's in the user's cache; one file per library build and
    processor.
    """
    path = _result_path(cache)
    said = _remembered(path)
    if said is None:
        said = run(command)
        _remember(path, said)
    if said != _FINE:
        raise RuntimeFailedError(_message(said))


def known_failure(cache: Path | None = None) -> str | None:
    """What `check` would raise, as far as is known without running anything."""
    said = _remembered(_result_path(cache))
    return None if said in (None, _FINE) else _message(str(said))


def run(command: Sequence[str] = CHILD, timeout: float = 120) -> str:
    """Run the child; "fine", or what happened to it in words."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return f"hangs for {timeout:.0f} s"
    if done.returncode == 0:
        return _FINE
    if done.returncode < 0:
        return f"crashes with {signal.Signals(-done.returncode).name}"
    last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
    return f"fails ({last[0]})"


def _message(said: str) -> str:
    return (
        f"the installed llama-cpp-python {said} on this machine when it multiplies quantized matrices; rebuild it: "
        f"{REBUILD}"
    )


def _result_path(cache: Path | None) -> Path | None:
    folder = cache or cache_folder()
    return None if folder is None else folder / f"llamacpp-{_fingerprint()}.txt"


def _fingerprint() -> str:
    """Changes with the build of the library (name, size, time of each file) and with the processor."""
    spec = importlib.util.find_spec("llama_cpp")
    beside = Path(spec.origin).parent / "lib" if spec and spec.origin else Path()
    folder = Path(os.environ.get("LLAMA_CPP_LIB_PATH") or beside)
    files = sorted(p for p in folder.glob("*") if p.is_file()) if folder != Path() else []
    facts = [f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files]
    return hashlib.sha256("\n".join([*facts, _processor()]).encode()).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _remembered(path: Path | None) -> str | None:
    try:
        return (path.read_text() or None) if path else None
    except OSError:
        return None


def _remember(path: Path | None, said: str) -> None:
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(said)
        part.replace(path)
    except OSError:
        return  # a read-only home: the child runs again next time


def main() -> None:
    """The child: exit 0 where all products agree with the plain layout's, else with a line on stderr."""
    from vlmedge.runtimes.llamacpp_native import load_native

    ggml = load_native().ggml
    backend = ggml.cpu_backend(2)
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((_ROWS, _COLUMNS), dtype=np.float32)
    x = rng.standard_normal((_COUNT, _COLUMNS), dtype=np.float32)
    for name, kind in _TYPES.items():
        packed = _quantize(ggml, kind, weight)
        for layout in _layouts(ggml):
            for rows in (x, x[:1]):
                got = _multiply(ggml, backend, kind, packed, rows, layout)
                wrong = got is not None and _distance(got, rows @ weight.T) > 0.2  # Q4_0 itself: 0.09
                if wrong:
                    sys.exit(f"{name} products in {ggml.backend_buft_name(layout).decode()} are wrong")


def _distance(a: F32, b: F32) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))


def _quantize(ggml: Ggml, kind: int, weight: F32) -> U8:
    packed = np.empty(ggml.row_size(kind, _COLUMNS) * _ROWS, np.uint8)
    ggml.quantize_init(kind)
    ggml.quantize_chunk(kind, weight.ctypes.data, packed.ctypes.data, 0, _ROWS, _COLUMNS, None)
    return packed


def _layouts(ggml: Ggml) -> list[int]:
    """The CPU backend's extra buffer types (repacked, AMX, ...), as llama.cpp's loader lists them."""
    pointer = ctypes.c_void_p
    extra = ggml.cpu_function(b"ggml_backend_dev_get_extra_bufts", ctypes.POINTER(pointer), pointer)
    found = extra(ggml.backend_dev_by_type(0)) if extra else None
    layouts: list[int] = []
    while found and found[len(layouts)]:
        layouts.append(found[len(layouts)])
    return layouts


def _multiply(ggml: Ggml, backend: int, kind: int, packed: U8, x: F32, layout: int) -> F32 | None:
    """Multiply x by weight^T, the weight in a buffer of that layout; None where the layout does not take the type."""
    weights, context = ggml.context(1), ggml.context(2)
    weight = ggml.new_tensor_2d(weights, kind, _COLUMNS, _ROWS)
    given = ggml.new_tensor_2d(context, TYPE_F32, x.shape[1], x.shape[0])
    buffer = ggml.backend_alloc_ctx_tensors_from_buft(weights, layout)
    product = ggml.mul_mat(context, weight, given)
    out = None
    if ggml.backend_dev_supports_op(ggml.backend_dev_by_type(0), product):
        out = np.empty((len(x), _ROWS), np.float32)
        GgmlTensor.from_address(given).data = x.ctypes.data
        GgmlTensor.from_address(product).data = out.ctypes.data
        ggml.backend_tensor_set(weight, packed.ctypes.data, 0, packed.nbytes)
        graph = ggml.new_graph(context)
        ggml.build_forward_expand(graph, product)
        ggml.backend_graph_compute(backend, graph)
    ggml.backend_buffer_free(buffer)
    ggml.free(context)
    ggml.free(weights)
    return out


if __name__ == "__main__":
    main()
