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
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnx_speed_children import PROMPT, READ, Reply
from real_size import Size, kv_bytes, machine, open_random, say, write_moondream

from vlmedge.device_bench.costs import crop_flops
from vlmedge.device_bench.others import busy_seconds
from vlmedge.runtimes.cores import physical_cores

ONNX, GGUF = ("q4-fast", "q4", "w8a8", "turbo"), ("q4_0", "q4")
STAGES = ("decode", "prefill", "vision", "first_token", "export", "memory")
CHILDREN = Path(__file__).with_name("onnx_speed_children.py")


class Child:
    """A variant's process."""

    def __init__(self, **words: Any) -> None:
        command = [sys.executable, str(CHILDREN), json.dumps(words)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.info: Reply = self._reply()["info"]

    def ask(self, **request: Any) -> Reply:
        """Send one request and wait for the reply; adds `others`, the processors that other processes took."""
        assert self._process.stdin is not None
        busy, start = busy_seconds() or 0.0, time.perf_counter()
        print(json.dumps(request), file=self._process.stdin, flush=True)
        reply = self._reply()
        taken = (busy_seconds() or 0.0) - busy - reply["child_cpu_s"]
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


@dataclass
class Variant:
    """One row of a stage: which child is asked for what (and for what to warm up), and what came back."""

    child: str
    request: Reply
    warm: Reply | None = None
    replies: list[Reply] = field(default_factory=list)

    def samples(self, calm: float) -> list[float]:
        """Seconds, without those that others disturbed, if any were calm."""
        quiet = [reply for reply in self.replies if reply["others"] <= calm]
        return [value for reply in quiet or self.replies for value in reply["seconds"]]


Stage = dict[str, Variant]


@dataclass
class Bench:
    """The random model, its exports, and the open children of one stage."""

    args: argparse.Namespace
    size: Size
    folder: Path
    stages: Sequence[str]
    children: dict[str, Child] = field(default_factory=dict)
    infos: dict[str, Reply] = field(default_factory=dict)

    def bundle(self, format: str, profile: str, shallow: bool = False) -> str:
        """An export's folder, written where it is not there yet."""
        folder = self.folder / f"{format}-{profile.replace(':', '-')}{'-shallow' if shallow else ''}"
        if not folder.is_dir():
            say(f"exporting {folder.name}")
            model = open_random(self.folder / "moondream2")
            model = model.shallow() if shallow else model
            model.exported(format, profile, folder, self.args.threads)
        return str(folder)

    def open(self, name: str, kind: str, **words: Any) -> str:
        """Start a child."""
        say(f"opening {name}")
        checkpoint = str(self.folder / "moondream2")
        self.children[name] = Child(kind=kind, checkpoint=checkpoint, threads=self.args.threads, **words)
        self.infos[name] = self.children[name].info
        return name

    def close(self) -> None:
        """End every child."""
        while self.children:
            self.children.popitem()[1].close()

    def hold(self, what: str) -> None:
        """Wait for the user's line, if wanted."""
        if self.args.hold:
            say(f"ready: {what}")
            sys.stdin.readline()

    def rounds(self, name: str, stage: Stage, count: int) -> Stage:
        """Warm up, then ask every variant `count` times, in alternating order."""
        for variant in stage.values():
            self._ask(variant, variant.request if variant.warm is None else variant.warm)
        for number in range(1, count + 1):
            self.hold(f"{name}, round {number} of {count}")
            for variant in list(stage.values())[:: 1 if number % 2 else -1]:
                again = {"seed": number} if "seed" in variant.request else {}
                variant.replies.append(self._ask(variant, variant.request | again))
            say(f"done: {name}, round {number}: {_brief(stage)}")
        return stage

    def _ask(self, variant: Variant, request: Reply) -> Reply:
        return self.children[variant.child].ask(**request) if request else {}


def _brief(stage: Stage) -> str:
    last = {name: variant.replies[-1] for name, variant in stage.items()}
    return "; ".join(f"{n} {statistics.median(r['seconds']):.4g} ({r['others']})" for n, r in last.items())


def measure_words(bench: Bench) -> Stage:
    """Prefill and decode of all profiles, and the memory's ceiling."""
    stage: Stage = {}
    tokens = {"tokens": bench.args.tokens}
    ways = {profile: bench.open(profile, "Onnx", folder=bench.bundle("onnx", profile)) for profile in bench.args.onnx}
    talk = {"talk": bench.args.talk}
    requests: dict[str, tuple[str, Reply]] = {f"ORT {name}": (name, {}) for name in ways}
    for profile in bench.args.gguf:
        opened = bench.open(f"llama.cpp {profile}", "Llama", folder=bench.bundle("gguf", profile))
        requests |= {f"{opened}, flash {'on' if f else 'off'}": (opened, {"flash": f}) for f in (0, 1)}
    for name, (opened, words) in requests.items():
        if "prefill" in bench.stages:
            stage[f"prefill {name}"] = Variant(opened, {"do": "prefill"} | words)
        if "decode" in bench.stages:
            stage[f"decode {name}"] = Variant(
                opened, {"do": "decode"} | tokens | words | (talk if opened in ways else {})
            )
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
    """A picture of 640 x 480 from its file's bytes to the first token; a small one of one crop warms up."""
    stage: Stage = {}
    opened = [bench.open(f"torch {dtype}", "Original", dtype=dtype) for dtype in ("f32", "bf16")]
    opened += [bench.open(f"ORT {p}", "Onnx", folder=bench.bundle("onnx", p)) for p in ("w8a8", "turbo")]
    small = {"do": "first_token", "width": 64, "height": 64, "seed": 0}
    for name in opened:
        stage[name] = Variant(name, small | {"width": 640, "height": 480}, warm=small)
    bench.rounds("first token", stage, min(2, bench.args.rounds))
    bench.close()
    return stage


def measure_export(bench: Bench) -> Stage:
    """The whole checkpoint through the exporter, a fresh process each."""
    stage: Stage = {}
    out = bench.folder / "export.out"
    for profile in ("q4", "w8a8"):
        request = {"do": "write", "profile": profile, "folder": str(out)}
        variant = Variant(bench.open(profile, "Export"), request, warm={})
        stage |= bench.rounds(f"export {profile}", {profile: variant}, 1)
        bench.close()
        shutil.rmtree(out)
    return stage


def measure_memory(bench: Bench) -> Stage:
    """Loading and memory, a fresh process each: fast, lean as first opened, lean with its cache."""
    stage: Stage = {}
    cache = bench.folder / "cache"
    bench.hold("memory")
    for profile in ("w8a8", "q4"):
        shutil.rmtree(cache, ignore_errors=True)
        lean = {"memory": "lean", "cache": str(cache)}
        for way, words in {"fast": {}, "lean, first": lean, "lean": lean}.items():
            opened = bench.open(f"{profile} {way}", "Onnx", folder=bench.bundle("onnx", profile), **words)
            variant = Variant(opened, {"do": "memory", "positions": 200}, warm={})
            variant.replies.append(bench.children[opened].ask(**variant.request))
            stage[opened] = variant
            bench.close()
    shutil.rmtree(cache, ignore_errors=True)
    say("done: memory")
    return stage


# ---- tables -----------------------------------------------------------------------------------------------------


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


MEASURES: dict[str, tuple[Callable[[Bench], Stage], dict[str, Callable[[Bench, Stage], dict[str, Reply]]]]] = {
    "words": (measure_words, {"prefill": report_prefill, "decode": report_decode}),
    "vision": (measure_vision, {"vision": report_vision}),
    "first_token": (measure_first_token, {"first_token": report_first_token}),
    "export": (measure_export, {"export": report_export}),
    "memory": (measure_memory, {"memory": report_memory}),
}


def run(bench: Bench) -> Reply:
    """Measure what is asked for and print its tables; return figures, every reply, and what the children are."""
    out: Reply = {}
    for name, (measure, reports) in MEASURES.items():
        wanted = {stage: report for stage, report in reports.items() if stage in bench.stages}
        if not wanted:
            continue
        bench.infos = {}
        measured = measure(bench)
        figures = {stage: report(bench, measured) for stage, report in wanted.items()}
        for stage, rows in figures.items():
            table(stage, rows)
        samples = {row: variant.replies for row, variant in measured.items()}
        out[name] = figures | {"samples": samples, "children": bench.infos}
    return out


def main() -> None:
    """Make the model, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 24), ("width", 2048), ("vision-layers", 27), ("vision-width", 1152)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--onnx", nargs="+", default=ONNX, help="profiles for words, PROFILE or PROFILE:FLAVOUR")
    parser.add_argument("--gguf", nargs="+", default=GGUF, help="llama.cpp's profiles for words")
    parser.add_argument("--talk", type=int, default=160, help="words of our sessions before words are timed")
    parser.add_argument("--tokens", type=int, default=16, help="decoded in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--calm", type=float, default=0.15, help="processors that others may take during a sample")
    parser.add_argument("--hold", action="store_true", help="wait for a line on stdin before every round")
    parser.add_argument("--work", type=Path, default=Path("/tmp/vlmedge-onnx-speed"))
    args = parser.parse_args()
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
    found = run(Bench(args, size, folder, stages))
    options = {"size": [args.layers, args.width, args.vision_layers, args.vision_width]}
    options |= {name: getattr(args, name) for name in ("onnx", "gguf", "talk", "tokens", "rounds", "threads", "calm")}
    print(
        json.dumps({"benchmark": "onnx_speed", "started": started} | options | {"machine": machine(), "stages": found})
    )


if __name__ == "__main__":
    main()
