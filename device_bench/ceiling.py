"""What this machine can do at most with so many threads: streaming reads and matrix products, measured in seconds."""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from vlmedge.device_bench.environment import cpu_flags, ram_bytes
from vlmedge.device_bench.result import Ceiling
from vlmedge.runtimes.cores import physical_cores

READ = 1 << 30  # bytes; the largest caches of single processors hold a part of it
_SHARE_OF_RAM = 8
_PASSES, _READING = 3, 0.3  # of the array at least, and seconds
# moondream2's largest product: one crop's rows times the tower's first MLP matrix.
ROWS, INNER, COLUMNS = 729, 1152, 4304
_PRODUCTS, _MULTIPLYING = 2, 0.3  # at least, and seconds
# Flags of processors whose bf16 instructions PyTorch uses (oneDNN); with others bf16 is many times slower than f32.
_BF16 = ("amx_bf16", "avx512_bf16", "bf16")

Product = Callable[[], object]


def measure(threads: int | None = None) -> Ceiling:
    """Measure with `threads` threads, None for the physical cores; about 3 s, and the memory is given back.

    Best of several everywhere: a ceiling is what the machine can do when nothing comes between.
    """
    count = threads or physical_cores()
    bandwidth = read_bandwidth(count)
    return Ceiling(count, bandwidth, dict(product_rates(count)))


def read_bandwidth(threads: int, size: int | None = None) -> float:
    """GB/s (10^9 bytes) of reading one array once with all threads, the best of at least 3 passes.

    Each thread adds up a part (int64, by numpy, without the interpreter's lock). The threads have written them too, so
    a machine of several memories has parts in each. What is counted is the array's bytes over the time until the last
    thread is done. `size`: bytes, None for 1 GiB or an eighth of the memory.
    """
    size = size or min(READ, (ram_bytes() or 8 * READ) // _SHARE_OF_RAM)
    parts = np.array_split(np.empty(size // 8, np.int64), threads)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda part: part.fill(1), parts))
        best = _best(lambda: list(pool.map(np.sum, parts)), _PASSES, _READING)
    return sum(part.nbytes for part in parts) / best / 1e9


def product_rates(threads: int) -> Iterator[tuple[str, float]]:
    """Type of the factors and GFLOP/s (10^9; a multiply-add is 2) of one product, for each type that a library has.

    "f32" and "int8" (u8 x s8, scaled to f32) in ONNX Runtime, which the `onnx` package makes the graphs for; "bf16" in
    PyTorch where the processor has instructions for it. PyTorch is imported last, the others do not see its threads.
    """
    makers: dict[str, Callable[[int], Product]] = {}
    if all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")):
        makers |= {"f32": _f32_product, "int8": _int8_product}
    if importlib.util.find_spec("torch") and not set(_BF16).isdisjoint(cpu_flags()):
        makers["bf16"] = _bf16_product
    for kind, make in makers.items():
        best = _best(make(threads), _PRODUCTS, _MULTIPLYING)
        gc.collect()  # a session that is gone has given back its threads and its matrices
        yield kind, 2.0 * ROWS * INNER * COLUMNS / best / 1e9


def _best(run: Product, least: int, seconds: float) -> float:
    """The shortest time in seconds, of `least` runs at least and as many as fit; one run before does not count."""
    run()
    times: list[float] = []
    while len(times) < least or sum(times) < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _f32_product(threads: int) -> Product:
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape, np.float32) for shape in ((ROWS, INNER), (INNER, COLUMNS)))
    return _onnx_product("MatMul", "", {"x": x}, {"w": w}, threads)


def _int8_product(threads: int) -> Product:
    rng = np.random.default_rng(0)
    x, w = rng.integers(0, 255, (ROWS, INNER), np.uint8), rng.integers(-127, 127, (INNER, COLUMNS), np.int8)
    scales = {"x_scale": np.float32(0.01), "w_scale": np.full(COLUMNS, 0.01, np.float32), "x_zero": np.uint8(128)}
    return _onnx_product("MatMulIntegerToFloat", "com.microsoft", {"x": x}, {"w": w, **scales}, threads)


def _onnx_product(op: str, domain: str, given: dict[str, Any], constants: dict[str, Any], threads: int) -> Product:
    """A graph of one node; the second factor is a constant, which the library may lay out as it likes."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    types = {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in given.items()}
    inputs = [helper.make_tensor_value_info(name, types[name], value.shape) for name, value in given.items()]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [ROWS, COLUMNS])]
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    node = helper.make_node(op, [*given, *constants], ["y"], domain=domain)
    graph = helper.make_graph([node], "product", inputs, outputs, stored)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
    return lambda: session.run(None, given)


def _bf16_product(threads: int) -> Product:
    from vlmedge.reference.product import bf16_product

    return bf16_product(ROWS, INNER, COLUMNS, threads)
