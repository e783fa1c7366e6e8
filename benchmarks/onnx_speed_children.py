"""The processes that benchmarks/onnx_speed.py drives: one variant each, asked for one thing at a time over a pipe."""

from __future__ import annotations

import ctypes
import importlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow
from real_size import Random, memory_mb, open_random

from vlmedge.prompt import Tokenizer
from vlmedge.session import F32, I32, Session, Step
from vlmedge.skills import Model

PROMPT = 20  # causal positions behind the picture
READ = 1_500_000_000  # bytes of a streaming read: several times any cache
Reply = dict[str, Any]


def seconds(run: Callable[[], object]) -> float:
    """How long `run` takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def repeated(run: Callable[[], object]) -> list[float]:
    """How long `run` takes, tried for half a second, so that the processors' accounts are exact enough."""
    spent = [seconds(run)]
    while sum(spent) < 0.5:
        spent.append(seconds(run))
    return spent[1:] or spent


class Opened:
    """A session (ours, or the original's) over the random model."""

    def __init__(self, model: Random, session: Session) -> None:
        self.spec, self.session = model.spec, session
        self.model = Model(model.spec, session, Tokenizer(model.tokenizer))
        self.rows = embeddings(model.spec.image_tokens + 1 + PROMPT, model.spec.decoder.width)
        self.talked = 0

    def prefill(self) -> Reply:
        """A picture's prefix, where all positions see each other, and a prompt behind it."""
        self.session.rewind(0)
        return {"seconds": [seconds(self._prefill)]}

    def _prefill(self) -> None:
        self.session.forward(self.rows[:-PROMPT], bidirectional=True)
        self.session.forward(self.rows[-PROMPT:])

    def decode(self, tokens: int, talk: int) -> Reply:
        """Seconds of each token, chosen greedily, behind picture and prompt; `talk` others come first, once."""
        if self.session.position < len(self.rows):
            self.prefill()
        token: I32 = np.array([7], np.int32)
        while self.talked < talk:  # a session that talks at length has its weights in huge pages (huge_pages.py)
            self._next(token)
            self.talked += 1
        self.session.rewind(len(self.rows))
        return {"seconds": [seconds(lambda: self._next(token)) for _ in range(tokens)]}

    def _next(self, token: I32) -> None:
        step: Step = self.session.forward(token)
        token[0] = step.logits.argmax()

    def vision(self, crops: int) -> Reply:
        """Seconds per crop."""
        size = self.spec.image.size
        pixels = np.random.default_rng(0).integers(0, 256, (crops, size, size, 3), np.uint8)
        return {"seconds": [seconds(lambda: self.session.vision(pixels)) / crops]}

    def first_token(self, width: int, height: int, seed: int) -> Reply:
        """From a JPEG's bytes to the first token of an answer; with the time of each stage."""
        data = jpeg(width, height, seed)
        start = time.perf_counter()
        answer = self.model.query(Pillow.open(io.BytesIO(data)), "What is in this picture?", max_tokens=1)
        spent = time.perf_counter() - start
        return {"seconds": [spent], "timings_ms": answer.timings_ms, "crops": answer.crops}


class Onnx(Opened):
    """One of our bundles in ONNX Runtime."""

    def __init__(self, model: Random, folder: Path, threads: int, memory: str = "fast", cache: str = "") -> None:
        from vlmedge.runtimes.onnxruntime_session import OnnxSession

        importlib.import_module("onnxruntime")
        self.start, kept, self.threads = memory_mb(), Path(cache) if cache else None, threads
        start = time.perf_counter()
        super().__init__(model, OnnxSession(model.spec, folder, threads=threads, memory=memory, cache=kept))
        self.load, self.info = time.perf_counter() - start, self.session.info()
        data = (folder / "onnx").glob("decoder_model_merged.onnx_data*")
        self.info |= {"weights": sum(file.stat().st_size for file in data)}
        self._product: Any = None

    def memory(self, positions: int) -> Reply:
        """Memory before and after opening, and after a prefill and some words."""
        out: Reply = {"load_s": self.load, "start": self.start, "opened": memory_mb()}
        self.session.forward(self.rows[:positions], bidirectional=True)
        out["prefilled"] = memory_mb()
        for _ in range(8):
            self._next(np.array([7], np.int32))
        return out | {"decoded": memory_mb()}

    def gemm(self, type: str) -> Reply:
        """Seconds of one product of the tower's largest shape."""
        vision = self.spec.vision
        if self._product is None:
            self._product = ort_product(type, vision.tokens, vision.width, vision.mlp_width, self.threads)
        return {"seconds": repeated(self._product)}


class Original(Opened):
    """The original in PyTorch."""

    def __init__(self, model: Random, threads: int, dtype: str) -> None:
        import torch

        from vlmedge.reference.session import TorchSession

        torch.set_num_threads(threads)
        super().__init__(model, TorchSession(model.spec, model.tensors, dtype=dtype, threads=threads))
        self.info = self.session.info()
        vision, kind = model.spec.vision, {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
        self._a = torch.randn(vision.tokens, vision.width).to(kind)
        self._b = torch.randn(vision.width, vision.mlp_width).to(kind)

    def gemm(self) -> Reply:
        """Seconds of one product of the tower's largest shape."""
        return {"seconds": repeated(lambda: self._a @ self._b)}


class Llama:
    """The shortest loop over libllama: a context with flash attention and one without, on the same weights."""

    def __init__(self, model: Random, folder: Path, threads: int) -> None:
        from vlmedge.runtimes.ggml_file import GgufFile
        from vlmedge.runtimes.llamacpp_native import load_native

        native, path, spec = load_native(), folder / "text.gguf", model.spec
        self.llama, self.vocab = native.llama, spec.decoder.vocab
        params = native.fill(self.llama.llama_model_default_params(), n_gpu_layers=0, load_mode=0, use_extra_bufts=True)
        self.weights = self.llama.llama_model_load_from_file(os.fsencode(path), params)
        batch = -(-(spec.image_tokens + 1) // 64) * 64
        self.contexts = [self._context(native, batch, threads, flash) for flash in (0, 1)]
        self.filled = [0, 0]
        self.rows = embeddings(spec.image_tokens + 1 + PROMPT, spec.decoder.width)
        tensors = GgufFile(path).tensors.values()
        read = sum(tensor.bytes for tensor in tensors if tensor.name != "token_embd.weight")
        self.info = {"system": self.llama.llama_print_system_info().decode(), "weights": read, "kv_cache": "f16"}

    def _context(self, native: Any, batch: int, threads: int, flash: int) -> Any:
        sizes = {"n_ctx": 2048, "n_batch": batch, "n_ubatch": batch, "n_threads": threads, "n_threads_batch": threads}
        params = native.fill(self.llama.llama_context_default_params(), flash_attn_type=flash, no_perf=True, **sizes)
        return self.llama.llama_init_from_model(self.weights, params)

    def _rewind(self, flash: int, position: int) -> None:
        self.llama.llama_memory_seq_rm(self.llama.llama_get_memory(self.contexts[flash]), 0, position, -1)

    def _append(self, flash: int, rows: F32, causal: bool) -> None:
        batch, context = self.llama.llama_batch(), self.contexts[flash]
        batch.n_tokens, batch.embd = len(rows), rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        self.llama.llama_set_causal_attn(context, causal)
        assert self.llama.llama_decode(context, batch) == 0
        self.llama.llama_get_logits_ith(context, -1)

    def prefill(self, flash: int) -> Reply:
        """As `Opened.prefill`."""
        self._rewind(flash, 0)
        self.filled[flash] = 1
        return {"seconds": [seconds(lambda: self._prefill(flash))]}

    def _prefill(self, flash: int) -> None:
        self._append(flash, self.rows[:-PROMPT], causal=False)
        self._append(flash, self.rows[-PROMPT:], causal=True)

    def decode(self, tokens: int, flash: int) -> Reply:
        """As `Opened.decode`; the best token is read in place."""
        if not self.filled[flash]:
            self.prefill(flash)
        self._rewind(flash, len(self.rows))
        one = (self.llama.llama_token * 1)(7)
        batch = self.llama.llama_batch_get_one(one, 1)
        return {"seconds": [seconds(lambda: self._next(flash, batch, one)) for _ in range(tokens)]}

    def _next(self, flash: int, batch: Any, one: Any) -> None:
        context = self.contexts[flash]
        assert self.llama.llama_decode(context, batch) == 0
        logits = self.llama.llama_get_logits_ith(context, -1)
        one[0] = int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())


class Memory:
    """The memory's ceiling."""

    def __init__(self, model: Random, threads: int) -> None:
        self._parts = np.array_split(np.ones(READ // 8, np.int64), threads)
        self._pool, self.info = ThreadPoolExecutor(threads), {"bytes": READ}

    def read(self) -> Reply:
        """Seconds of reading READ bytes with every thread; numpy lets go of the interpreter meanwhile."""
        return {"seconds": [seconds(lambda: list(self._pool.map(np.sum, self._parts))) for _ in range(3)]}


class Export:
    """One pass of the exporter over the checkpoint."""

    def __init__(self, model: Random, threads: int) -> None:
        for name in ("exporter", "files", "stream", "consumers"):
            importlib.import_module(f"vlmedge.exporters.onnx.{name}")
        self._model, self._threads, self.info = model, threads, {}

    def write(self, profile: str, folder: str) -> Reply:
        """Seconds and processor seconds, the peak of memory and what there was before."""
        os.sync()
        before, cpu = memory_mb(), cpu_seconds()
        spent = seconds(lambda: self._model.export("onnx", profile, Path(folder), self._threads))
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.*"))
        base = before["anonymous"] + before["file"]
        out = {"seconds": [spent], "cpu_s": cpu_seconds() - cpu, "base_mb": base, "peak_mb": memory_mb()["peak"]}
        return out | {"above_base_mb": out["peak_mb"] - base, "bytes": size}


KINDS: dict[str, Callable[..., Any]] = {kind.__name__: kind for kind in (Onnx, Original, Llama, Memory, Export)}


def embeddings(count: int, width: int) -> F32:
    """Random inputs of a decoder, float32 [count, width]."""
    return np.random.default_rng(0).standard_normal((count, width), dtype=np.float32) * np.float32(0.5)


def jpeg(width: int, height: int, seed: int) -> bytes:
    """A picture of random clouds; another for every seed, so that nothing is remembered."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 16, width // 16, 3), np.uint8)
    out = io.BytesIO()
    Pillow.fromarray(coarse).resize((width, height)).save(out, "JPEG", quality=90)
    return out.getvalue()


def ort_product(type: str, rows: int, inner: int, columns: int, threads: int) -> Callable[[], object]:
    """A graph of one matrix product in ONNX Runtime: "f32", or "int8" (u8 x s8, scaled to float)."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rng, quantized = np.random.default_rng(0), type == "int8"
    x = rng.integers(0, 255, (rows, inner), np.uint8) if quantized else embeddings(rows, inner)
    w = rng.integers(-127, 127, (inner, columns), np.int8) if quantized else embeddings(inner, columns)
    scales = {"a_scale": np.float32(0.01), "w_scale": np.full(columns, 0.01, np.float32), "zero": np.uint8(128)}
    values = {"w": w} | (scales if quantized else {})
    names = ["x", "w", *(scales if quantized else {})]
    op, domain = ("MatMulIntegerToFloat", "com.microsoft") if quantized else ("MatMul", "")
    node = helper.make_node(op, names, ["y"], domain=domain)
    kind = TensorProto.UINT8 if quantized else TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info("x", kind, [rows, inner])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, columns])]
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    graph = helper.make_graph([node], "g", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": x})


def cpu_seconds() -> float:
    """User and system time of this process so far."""
    return sum(os.times()[:2])


def child(words: Mapping[str, Any]) -> None:
    """Open what `words` names, then answer requests, a line of JSON each; what libraries print goes to stderr."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    options = dict(words)
    model = open_random(Path(options.pop("checkpoint")))
    kind = KINDS[options.pop("kind")]
    model = model.shallow() if options.pop("shallow", False) else model
    paths = {name: Path(options.pop(name)) for name in ("folder",) if name in options}
    subject = kind(model, **paths, **options)
    print(json.dumps({"info": subject.info}), file=replies)
    idle, since = cpu_seconds(), time.perf_counter()
    for line in sys.stdin:
        request = json.loads(line)
        before = cpu_seconds()
        waited = {"idle_cpu_s": before - idle, "idle_s": time.perf_counter() - since}
        reply = getattr(subject, request.pop("do"))(**request)
        print(json.dumps({"child_cpu_s": cpu_seconds() - before} | waited | reply), file=replies)
        idle, since = cpu_seconds(), time.perf_counter()


if __name__ == "__main__":
    child(json.loads(sys.argv[1]))
