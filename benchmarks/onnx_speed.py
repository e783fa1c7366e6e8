"""ONNX bundles at real size, beside llama.cpp and the original: words, prompts, pictures, export, memory.

Every variant runs in a child process that stays alive and computes when it is asked to, one at a time, in rounds of
alternating order. So variants share the machine's weather but neither memory nor threads. What other processes took
of the processors is measured with every sample (`others`, in processors): samples with more than `--calm` do not
count where there are calm ones. Ceilings (streaming read, matrix products) are measured in the same rounds. The
checkpoint is moondream2's shape with random weights in bf16; it and the exports (15 GB) stay in `--work`. The last line
of the output is one JSON object with every sample.

    python benchmarks/onnx_speed.py

A smoke test:

    python benchmarks/onnx_speed.py --layers 2 --width 256 --vision-layers 2 --vision-width 128 --rounds 1
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow
from real_size import Random, Size, machine, memory_mb, open_random, say, write_moondream

from vlmedge.prompt import Tokenizer
from vlmedge.runtimes.cores import physical_cores
from vlmedge.session import F32, I32, Session, Step
from vlmedge.skills import Model
from vlmedge.spec import DecoderSpec, VisionSpec

ONNX, GGUF = ("q4-fast", "q4", "w8a8", "turbo"), ("q4_0", "q4")
STAGES = ("decode", "prefill", "vision", "first_token", "export", "memory")
PROMPT = 20  # causal positions behind the picture
READ = 1_500_000_000  # bytes of a streaming read: several times any cache
TICK = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
Reply = dict[str, Any]


# ---- children: one variant each -------------------------------------------------------------------------------


def seconds(run: Callable[[], object]) -> float:
    """How long `run` takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Opened:
    """A session (ours, or the original's) over the random model."""

    def __init__(self, model: Random, session: Session) -> None:
        self.spec, self.session = model.spec, session
        self.model = Model(model.spec, session, Tokenizer(model.tokenizer))
        self.rows = embeddings(model.spec.image_tokens + 1 + PROMPT, model.spec.decoder.width)

    def prefill(self) -> Reply:
        """A picture's prefix, where all positions see each other, and a prompt behind it."""
        self.session.rewind(0)
        return {"seconds": [seconds(self._prefill)]}

    def _prefill(self) -> None:
        self.session.forward(self.rows[:-PROMPT], bidirectional=True)
        self.session.forward(self.rows[-PROMPT:])

    def decode(self, tokens: int) -> Reply:
        """Seconds of each token, chosen greedily, behind picture and prompt."""
        if self.session.position < len(self.rows):
            self.prefill()
        self.session.rewind(len(self.rows))
        token: I32 = np.array([7], np.int32)
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
        return {"seconds": [seconds(self._product) for _ in range(12)][2:]}


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
        return {"seconds": [seconds(lambda: self._a @ self._b) for _ in range(12)][2:]}


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


# ---- the parent: asks in turn, reports --------------------------------------------------------------------------


class Child:
    """A variant's process."""

    def __init__(self, **words: Any) -> None:
        command = [sys.executable, __file__, "--child", json.dumps(words)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.info: Reply = self._reply()["info"]

    def ask(self, **request: Any) -> Reply:
        """Send one request and wait for the reply; adds `others`, the processors that other processes took."""
        assert self._process.stdin is not None
        busy, start = machine_cpu_seconds(), time.perf_counter()
        print(json.dumps(request), file=self._process.stdin, flush=True)
        reply = self._reply()
        taken = machine_cpu_seconds() - busy - reply["child_cpu_s"]
        return reply | {"others": round(max(0.0, taken) / (time.perf_counter() - start), 3)}

    def _reply(self) -> Reply:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a child died: status {self._process.wait()}")
        reply: Reply = json.loads(line)
        return reply

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def machine_cpu_seconds() -> float:
    """Processor time that all processes took since the start of the machine; 0 where the system does not tell."""
    try:
        words = Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
    except OSError:
        return 0.0
    user, nice, system, _idle, _wait, irq, soft, steal = map(int, words)
    return (user + nice + system + irq + soft + steal) / TICK


@dataclass
class Variant:
    """One row of a stage: which child is asked for what, and what came back."""

    child: str
    request: Reply
    replies: list[Reply] = field(default_factory=list)

    def samples(self, calm: float) -> list[float]:
        """Seconds, without those that others disturbed, if any were calm."""
        quiet = [reply for reply in self.replies if reply["others"] <= calm]
        return [value for reply in quiet or self.replies for value in reply["seconds"]]


Stage = dict[str, Variant]


@dataclass
class Bench:
    """The random model, its exports, the children that are open, and everything measured so far."""

    args: argparse.Namespace
    size: Size
    folder: Path
    children: dict[str, Child] = field(default_factory=dict)
    infos: dict[str, Reply] = field(default_factory=dict)

    def bundle(self, format: str, profile: str, shallow: bool = False) -> str:
        """An export's folder, written where it is not there yet."""
        name = f"{format}-{profile}{'-shallow' if shallow else ''}"
        if not (self.folder / name).is_dir():
            say(f"exporting {name}")
            model = open_random(self.folder / "moondream2")
            model = model.shallow() if shallow else model
            model.exported(format, profile, self.folder / name, self.args.threads)
        return str(self.folder / name)

    def open(self, name: str, kind: str, **words: Any) -> str:
        """Start a child."""
        say(f"opening {name}")
        checkpoint = str(self.folder / "moondream2")
        opened = Child(kind=kind, checkpoint=checkpoint, threads=self.args.threads, **words)
        self.children[name], self.infos[name] = opened, opened.info
        return name

    def close(self) -> None:
        """End every child."""
        while self.children:
            self.children.popitem()[1].close()

    def rounds(self, name: str, stage: Stage, count: int) -> Stage:
        """Ask every variant in alternating order, `count` times, after one round that warms up."""
        for number in range(count + 1):
            if number and self.args.hold:
                say(f"ready: {name}, round {number} of {count}")
                sys.stdin.readline()
            for variant in list(stage.values())[:: 1 if number % 2 else -1]:
                reply = self.children[variant.child].ask(**variant.request)
                variant.replies += [reply] if number else []
            if number:
                say(f"done: {name}, round {number}: " + _brief(stage))
        return stage


def _brief(stage: Stage) -> str:
    last = {name: variant.replies[-1] for name, variant in stage.items()}
    return ", ".join(f"{n} {statistics.median(r['seconds']):.4g} ({r['others']})" for n, r in last.items())


def measure_words(bench: Bench, decode: bool, prefill: bool) -> Stage:
    """Prefill and decode of all profiles, and the memory's ceiling."""
    stage: Stage = {}
    tokens = {"tokens": bench.args.tokens}
    ways = {profile: bench.open(profile, "Onnx", folder=bench.bundle("onnx", profile)) for profile in ONNX}
    requests: dict[str, tuple[str, Reply]] = {f"ORT {name}": (name, {}) for name in ways}
    for profile in GGUF:
        opened = bench.open(f"llama.cpp {profile}", "Llama", folder=bench.bundle("gguf", profile))
        requests |= {f"{opened}, flash {'on' if f else 'off'}": (opened, {"flash": f}) for f in (0, 1)}
    for name, (opened, words) in requests.items():
        if prefill:
            stage[f"prefill {name}"] = Variant(opened, {"do": "prefill"} | words)
        if decode:
            stage[f"decode {name}"] = Variant(opened, {"do": "decode"} | tokens | words)
    stage["read"] = Variant(bench.open("read", "Memory"), {"do": "read"})
    bench.rounds("words", stage, bench.args.rounds)
    bench.close()
    return stage


def measure_vision(bench: Bench) -> Stage:
    """The tower of the original and ours, one crop and nine, and the ceilings of its products."""
    stage: Stage = {}
    f32 = bench.open("f32", "Onnx", folder=bench.bundle("onnx", "f32", shallow=True), shallow=True)
    w8a8 = bench.open("w8a8", "Onnx", folder=bench.bundle("onnx", "w8a8"))
    for dtype in ("f32", "bf16"):
        opened = bench.open(f"torch {dtype}", "Original", dtype=dtype, shallow=True)
        stage[opened] = Variant(opened, {"do": "vision", "crops": 1})
        stage[f"product {opened}"] = Variant(opened, {"do": "gemm"})
    for name, opened, kind in (("f32", f32, "f32"), ("w8a8", w8a8, "int8")):
        stage[f"ORT {name}"] = Variant(opened, {"do": "vision", "crops": 1})
        stage[f"ORT {name}, 9 crops"] = Variant(opened, {"do": "vision", "crops": 9})
        stage[f"product ORT {name}"] = Variant(opened, {"do": "gemm", "type": kind})
    bench.rounds("vision", stage, bench.args.rounds)
    bench.close()
    return stage


def measure_first_token(bench: Bench) -> Stage:
    """A picture of 640 x 480 from its file's bytes to the first token; a first picture of one crop warms up."""
    stage: Stage = {}
    opened = [bench.open(f"torch {dtype}", "Original", dtype=dtype) for dtype in ("f32", "bf16")]
    opened += [bench.open(f"ORT {p}", "Onnx", folder=bench.bundle("onnx", p)) for p in ("w8a8", "turbo")]
    small = {"do": "first_token", "width": 64, "height": 64, "seed": 0}
    for name in opened:
        bench.children[name].ask(**small)
        stage[name] = Variant(name, small | {"width": 640, "height": 480})
    count = min(2, bench.args.rounds)
    for number in range(count):
        if bench.args.hold:
            say(f"ready: first_token, round {number + 1} of {count}")
            sys.stdin.readline()
        for variant in list(stage.values())[:: 1 if number % 2 else -1]:
            variant.replies.append(bench.children[variant.child].ask(**variant.request | {"seed": number + 1}))
        say(f"done: first_token, round {number + 1}: " + _brief(stage))
    bench.close()
    return stage


def measure_export(bench: Bench) -> Stage:
    """The whole checkpoint through the exporter, a fresh process each."""
    stage: Stage = {}
    for profile in ("q4", "w8a8"):
        opened, out = bench.open(profile, "Export"), bench.folder / "export.out"
        variant = Variant(opened, {"do": "write", "profile": profile, "folder": str(out)})
        if bench.args.hold:
            say(f"ready: export {profile}")
            sys.stdin.readline()
        os.sync()
        variant.replies.append(bench.children[opened].ask(**variant.request))
        say(f"done: export {profile}: " + _brief({profile: variant}))
        stage[profile] = variant
        bench.close()
        shutil.rmtree(out)
    return stage


def measure_memory(bench: Bench) -> Stage:
    """Loading and memory, a fresh process each: fast, lean as first opened, lean with its cache."""
    stage: Stage = {}
    cache = bench.folder / "cache"
    for profile in ("w8a8", "q4"):
        shutil.rmtree(cache, ignore_errors=True)
        lean = {"memory": "lean", "cache": str(cache)}
        for way, words in {"fast": {}, "lean, first": lean, "lean": lean}.items():
            opened = bench.open(f"{profile} {way}", "Onnx", folder=bench.bundle("onnx", profile), **words)
            variant = Variant(opened, {"do": "memory", "positions": 200})
            variant.replies.append(bench.children[opened].ask(**variant.request))
            stage[opened] = variant
            bench.close()
    shutil.rmtree(cache, ignore_errors=True)
    return stage


# ---- tables -----------------------------------------------------------------------------------------------------


def kv_bytes(decoder: DecoderSpec, kind: str, positions: float) -> float:
    """Bytes of keys and values that a token at `positions` reads."""
    item = {"f32": 4, "f16": 2, "int8": 1}[kind]
    return 2.0 * decoder.layers * decoder.kv_heads * decoder.head_dim * item * positions


def crop_flops(vision: VisionSpec) -> float:
    """Operations of one crop's matrix products."""
    w, m, n = vision.width, vision.mlp_width, vision.tokens
    layer = 2.0 * n * (4 * w * w + 2 * w * m) + 4.0 * n * n * w
    return vision.layers * layer + 2.0 * n * w * vision.channels * vision.patch_size**2


def report_decode(bench: Bench, stage: Stage) -> dict[str, Reply]:
    """Milliseconds, bytes and the fraction of the memory's speed, beside llama.cpp's best."""
    spec, calm = bench.size.spec(), bench.args.calm
    ceiling = READ / min(stage["read"].samples(calm)) if "read" in stage else float("nan")
    positions = spec.image_tokens + 1 + PROMPT + bench.args.tokens / 2
    rows = {name: v for name, v in stage.items() if name.startswith("decode ")}
    best = min(statistics.median(v.samples(calm)) for name, v in rows.items() if "llama.cpp" in name)
    out: dict[str, Reply] = {}
    for name, variant in rows.items():
        middle, info = statistics.median(variant.samples(calm)), bench.infos[variant.child]
        read = info["weights"] + kv_bytes(spec.decoder, info["kv_cache"], positions)
        row = {
            "ms": middle * 1e3,
            "tokens_per_s": 1 / middle,
            "mb_per_token": read / 1e6,
            "gb_per_s": read / middle / 1e9,
        }
        out[name] = row | {"of_bandwidth": read / middle / ceiling, "times_best_llama": best / middle}
    return out


def report_prefill(bench: Bench, stage: Stage) -> dict[str, Reply]:
    """Seconds, beside llama.cpp's best."""
    rows = {
        name: statistics.median(v.samples(bench.args.calm)) for name, v in stage.items() if name.startswith("prefill ")
    }
    best = min(value for name, value in rows.items() if "llama.cpp" in name)
    return {name: {"s": value, "times_best_llama": best / value} for name, value in rows.items()}


def report_vision(bench: Bench, stage: Stage) -> dict[str, Reply]:
    """Milliseconds per crop, the fraction of the product's own speed, beside the original."""
    vision, middle = bench.size.spec().vision, lambda name: statistics.median(stage[name].samples(bench.args.calm))
    product = 2.0 * vision.tokens * vision.width * vision.mlp_width
    out: dict[str, Reply] = {}
    for name in (name for name in stage if not name.startswith("product ")):
        rate = product / middle(f"product {name.partition(',')[0]}")
        speed = crop_flops(vision) / middle(name)
        row = {"ms_per_crop": middle(name) * 1e3, "gflop_per_s": speed / 1e9, "product_gflop_per_s": rate / 1e9}
        out[name] = row | {"of_product": speed / rate, "times_torch_f32": middle("torch f32") / middle(name)}
    return out


def report_first_token(bench: Bench, stage: Stage) -> dict[str, Reply]:
    """Seconds, and each stage's share of them."""
    out: dict[str, Reply] = {}
    first = statistics.median(stage["torch f32"].samples(bench.args.calm))
    for name, variant in stage.items():
        middle, last = statistics.median(variant.samples(bench.args.calm)), variant.replies[-1]
        parts = {k: v / 1e3 for k, v in last["timings_ms"].items() if k in ("vision", "project", "prefill", "prompt")}
        out[name] = {"s": middle, "of_torch_f32": middle / first, "crops": last["crops"]} | parts
    return out


def report_export(bench: Bench, stage: Stage) -> dict[str, Reply]:
    """Seconds and memory."""
    keys = ("cpu_s", "base_mb", "peak_mb", "above_base_mb")
    rows = {name: variant.replies[-1] for name, variant in stage.items()}
    return {name: {"s": row["seconds"][0]} | {k: row[k] for k in keys} for name, row in rows.items()}


def report_memory(bench: Bench, stage: Stage) -> dict[str, Reply]:
    """Seconds to open, and MB of anonymous and file memory."""
    out: dict[str, Reply] = {}
    for name, variant in stage.items():
        reply = variant.replies[-1]
        steps = {"opened": "opened", "prefilled": "after 200", "decoded": "after words"}
        out[name] = {"load_s": reply["load_s"], "start_anon_mb": reply["start"]["anonymous"]}
        out[name] |= {
            f"{word}: {k[:4]} MB": reply[step][k] for step, word in steps.items() for k in ("anonymous", "file")
        }
    return out


def table(title: str, rows: Mapping[str, Reply]) -> None:
    """Print rows of figures."""
    columns = list(next(iter(rows.values())))
    width = max(map(len, rows)) + 2
    print(f"\n{title}\n{'':{width}}" + "".join(f"{column:>{len(column) + 3}}" for column in columns))
    for name, row in rows.items():
        print(
            f"{name:{width}}"
            + "".join(f"{row[column]:>{len(column) + 3}.{_digits(row[column])}f}" for column in columns)
        )


def _digits(value: float) -> int:
    return 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3


def run(bench: Bench, stages: Sequence[str]) -> Reply:
    """Measure what is asked for; return the figures and every reply."""
    measured: dict[str, Stage] = {}
    if {"decode", "prefill"} & set(stages):
        words = measure_words(bench, "decode" in stages, "prefill" in stages)
        measured |= {name: words for name in ("decode", "prefill") if name in stages}
    others = {"vision": measure_vision, "first_token": measure_first_token}
    others |= {"export": measure_export, "memory": measure_memory}
    measured |= {name: measure(bench) for name, measure in others.items() if name in stages}
    reports = {name: globals()[f"report_{name}"](bench, stage) for name, stage in measured.items()}
    for name, rows in reports.items():
        table(name, rows)
    replies = {id(s): {name: v.replies for name, v in s.items()} for s in measured.values()}
    samples = dict(zip(measured, (replies[id(s)] for s in measured.values()), strict=True))
    if "decode" in samples and "prefill" in samples:
        samples["prefill"] = "with decode"
    return {"figures": reports, "samples": samples, "children": bench.infos}


def main() -> None:
    """Make the model, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 24), ("width", 2048), ("vision-layers", 27), ("vision-width", 1152)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--tokens", type=int, default=16, help="decoded in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--calm", type=float, default=0.15, help="processors that others may take during a sample")
    parser.add_argument("--hold", action="store_true", help="wait for a line on stdin before every round")
    parser.add_argument("--work", type=Path, default=Path("/tmp/vlmedge-onnx-speed"))
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    stages = args.stages.split(",")
    if unknown := set(stages) - set(STAGES):
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    size = Size(args.layers, args.width, args.vision_layers, args.vision_width)
    folder = args.work / f"{size.layers}x{size.width}-{size.vision_layers}x{size.vision_width}"
    if not folder.is_dir():
        part = folder.with_name(f"{folder.name}.part")
        write_moondream(part / "moondream2", size)
        part.rename(folder)
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    found = run(Bench(args, size, folder), stages)
    options = {"size": [args.layers, args.width, args.vision_layers, args.vision_width]}
    options |= {name: getattr(args, name) for name in ("tokens", "rounds", "threads", "calm")}
    print(json.dumps({"benchmark": "onnx_speed", "started": started} | options | {"machine": machine()} | found))


if __name__ == "__main__":
    main()
