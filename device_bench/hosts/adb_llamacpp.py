"""GGUF bundles on a phone, timed by llama.cpp's programs: llama-bench for the decoder, llama-mtmd-cli for the tower.

What they do not do as vlmedge does: llama-bench fills its positions causally and with random tokens, and counts neither
sampling nor detokenizing (tools/llama-bench/README.md); llama-mtmd-cli encodes one crop per picture, projector
included, and prints whole milliseconds.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from typing import Any, Final

from vlmedge.bundle import Bundle
from vlmedge.device_bench.hosts.adb_run import ProgramError, Ran, Runner
from vlmedge.device_bench.hosts.adb_stages import Sweep, Task, samples
from vlmedge.device_bench.job import Job
from vlmedge.device_bench.result import Sample

PROGRAMS: Final = ("llama-bench", "llama-mtmd-cli")
NOTES: Final = (
    "llama.cpp's stock programs answer no questions: agreement is not measured",
    "prefill is llama-bench's causal one",
    "vision is the time of one crop, projector included, times the crops",
)
# The devices of ggml's backends by the beginning of their names (ggml/src/ggml-*/: "Vulkan0", "GPUOpenCL", "HTP0").
_BACKENDS = {"Vulkan": "vulkan", "GPUOpenCL": "opencl", "OpenCL": "opencl", "HTP": "hexagon"}
# tools/mtmd/mtmd-cli.cpp, and before it encoded in batches mtmd-helper.cpp, whose words -lv 4 lets through.
_ENCODED = (re.compile(r"mtmd batch encoding done in (\d+) ms"), re.compile(r"image slice encoded in (\d+) ms"))
_DEVICE = re.compile(r"^\s+(\w+): (.*)$", re.MULTILINE)
_FACTS = ("build_commit", "build_number", "cpu_info", "gpu_info", "backends", "model_type", "type_k", "flash_attn")


def units_of(listed: str) -> dict[str, str]:
    """Unit -> the name of its device, from what `llama-bench --list-devices` prints ("  Vulkan0: Adreno (...)").

    The CPU is always there and is not listed.
    """
    out = {"cpu": "none"}
    for name, _ in _DEVICE.findall(listed):
        unit = next((unit for start, unit in _BACKENDS.items() if name.startswith(start)), None)
        if unit is not None:
            out.setdefault(unit, name)
    return out


def files_of(bundle: Bundle) -> tuple[str, ...]:
    """The bundle's files that the programs read."""
    return tuple(entry.path for entry in bundle.manifest.files if entry.role in ("text", "mmproj"))


class LlamaCpp:
    """llama.cpp's programs in the folder `programs` of a phone, with a bundle's files in `model` there."""

    def __init__(self, runner: Runner, programs: str, model: str, bundle: Bundle, device: str) -> None:
        """`device`: ggml's name of what computes, "none" for the CPU."""
        self._runner, self._programs, self._model = runner, programs, model
        self._device = device
        names = files_of(bundle)
        self._text = next(name for name in sorted(names) if name.startswith("text"))
        self._mmproj = next((name for name in names if name.startswith("mmproj")), None)

    def sweep(self, job: Job, tasks: Sequence[Task], pictures: Sequence[str], can_see: bool, at: float) -> Sweep:
        """Time all stages of all asks; `pictures`: where they lie on the phone, `can_see`: llama-mtmd-cli is there."""
        started = time.monotonic()
        facts: dict[str, Any] = {}
        out: list[Sample] = []
        for task, picture in zip(tasks, pictures, strict=True):
            now = at + time.monotonic() - started
            prefill, facts = self._bench(job, prompt=task.prefix)
            times = {"prefill": prefill, "decode": []}
            if task.prompt:
                times["prompt"], _ = self._bench(job, prompt=task.prompt, depth=task.prefix)
            if job.work.tokens > 1:  # the first token comes of the prompt
                new = job.work.tokens - 1
                whole, _ = self._bench(job, new=new, depth=task.prefix + task.prompt)
                times["decode"] = [ms / new for ms in whole]
            if can_see and self._mmproj:
                encoded = [self._encode(job, task, picture) for _ in range(job.work.repeat)]
                times["vision"] = [ms * task.counts.encoded_crops for ms in encoded]
            out += samples(task.ask.name, now, times)
        return Sweep(tuple(out), {"llama.cpp": facts, "notes": list(NOTES)})

    def _bench(self, job: Job, *, prompt: int = 0, new: int = 0, depth: int = 0) -> tuple[list[float], dict[str, Any]]:
        """Milliseconds of each repetition, and what the program is."""
        batch = str(max(512, prompt, depth))  # a picture in one piece, as vlmedge computes it
        words = ["-p", str(prompt), "-n", str(new), "-r", str(job.work.repeat), "-b", batch, "-ub", batch]
        words += ["-d", str(depth)] if depth else []
        words += [] if job.work.warmup else ["--no-warmup"]
        ran = self._run("llama-bench", job, [*words, "-o", "jsonl"])
        return read_bench(ran.stdout, (prompt, new, depth), gpu=self._device != "none")

    def _encode(self, job: Job, task: Task, picture: str) -> float:
        """Milliseconds of one crop."""
        words = [
            "--mmproj",
            f"{self._model}/{self._mmproj}",
            "--image",
            picture,
            "-p",
            task.ask.question or "Describe it.",
        ]
        words += ["-n", "1", "--temp", "0", "-lv", "4", *(() if self._device != "none" else ("--no-mmproj-offload",))]
        return read_encoded(self._run("llama-mtmd-cli", job, words))

    def _run(self, program: str, job: Job, words: Sequence[str]) -> Ran:
        variant = job.variant
        threads = [] if variant is None or variant.threads is None else ["-t", str(variant.threads)]
        place = ["-ngl", "0" if self._device == "none" else "99", "-dev", self._device]
        argv = [f"{self._programs}/{program}", "-m", f"{self._model}/{self._text}", *threads, *place, *words]
        return self._runner.run(argv, {"LD_LIBRARY_PATH": self._programs})


def read_bench(stdout: str, wanted: tuple[int, int, int], *, gpu: bool) -> tuple[list[float], dict[str, Any]]:
    """Milliseconds of each repetition from one line of `llama-bench -o jsonl`, and facts of build and machine.

    `wanted`: n_prompt, n_gen, n_depth of the line. Raises ProgramError for output without it, or with `gpu` for a line
    that was computed without one.
    """
    for line in stdout.splitlines():
        try:
            data = json.loads(line)
            found = (data["n_prompt"], data["n_gen"], data.get("n_depth", 0))
            times = [float(ns) / 1e6 for ns in data["samples_ns"]]
        except (ValueError, TypeError, KeyError):
            continue
        if found != wanted:
            continue
        if gpu and not data.get("gpu_info"):
            raise ProgramError("unavailable", "llama-bench found no GPU on the phone and used the CPU; use --unit cpu")
        return times, {key: data[key] for key in _FACTS if key in data}
    raise ProgramError("rubbish", f"llama-bench printed no line of its results: {stdout.strip()[-120:]!r}")


def read_encoded(ran: Ran) -> float:
    """Milliseconds that llama-mtmd-cli took for the picture, of all its slices; ProgramError where it does not say."""
    for pattern in _ENCODED:
        found = [int(ms) for ms in pattern.findall(ran.stdout + ran.stderr)]
        if found:
            return float(sum(found))
    raise ProgramError("rubbish", "llama-mtmd-cli printed no time of encoding; use a newer llama.cpp")
