"""ONNX bundles on a phone, timed graph by graph by ONNX Runtime's onnxruntime_perf_test.

It generates its own inputs of the shapes that it is told (zeros; -I and -f of onnxruntime/test/perftest/
command_args_parser.cc) and writes one line of seconds for each run. It cannot bind outputs to inputs: each call copies
the KV cache, which vlmedge never does, so decoding is slower here than in an app that shares its buffers.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from vlmedge.bundle import Bundle
from vlmedge.device_bench.hosts.adb_run import ProgramError, Ran, Runner
from vlmedge.device_bench.hosts.adb_stages import Sweep, Task, samples
from vlmedge.device_bench.job import Job
from vlmedge.device_bench.result import Sample
from vlmedge.imaging import stitch_index
from vlmedge.session import PREFILL_OVER

PROGRAMS: Final = ("onnxruntime_perf_test",)
UNITS: Final = ("cpu", "xnnpack", "nnapi", "qnn", "webgpu")
OPTIONS: Final = {"qnn": ("-i", "backend_path|libQnnHtp.so")}
NOTES: Final = (
    "onnxruntime_perf_test answers no questions: agreement is not measured",
    "every call copies the KV cache, which an app that shares its buffers does not",
    "vision is the time of one crop times the crops",
    "each graph ran in a process of its own, so there is no peak of all together",
)
DECODER, PREFILL = "decoder_model_merged", "decoder_prefill"
_LOADED = re.compile(r"Session creation time cost: ([0-9.e+-]+) s")
_RESULT, _PROFILE = "result.csv", "profile"


def files_of(bundle: Bundle) -> tuple[str, ...]:
    """The bundle's files that the program reads: graphs and their data, without the region heads and the embeddings.

    All data files: a tied table lies with one graph and is read by another.
    """
    names = [entry.path for entry in bundle.manifest.files if entry.path.startswith("onnx/")]
    return tuple(name for name in names if not name.startswith("onnx/region_"))


def probe_model() -> bytes:
    """The smallest graph there is, y = x + x over float32 [1], to see which providers a build has."""
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "probe", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    content: bytes = model.SerializeToString()
    return content


def shapes(stage: str, task: Task, bundle: Bundle) -> dict[str, int]:
    """The graph's free dimensions for one stage of an ask.

    Flavour "ort" has its keys and values in a buffer of all positions, alive or not; "portable" in one of those that
    were alive before, and that cannot be empty here, because perf_test takes no dimension of 0.
    """
    if stage == "vision":
        return {"num_crops": 1}
    if stage == "project":
        rows, columns = stitch_index(bundle.manifest.model.image, task.tiling).shape
        return {"num_crops": task.counts.crops, "grid_rows": rows, "grid_columns": columns}
    new, before = {
        "prefill": (task.prefix, 0),
        "prompt": (task.prompt, task.prefix),
        "decode": (1, task.depth),
    }[stage]
    if bundle.manifest.flavour == "portable":
        before = max(before, 1)
        past = before
    else:
        past = before + new
    return {"sequence_length": new, "total_sequence_length": before + new, "past_sequence_length": past}


class OnnxRuntime:
    """onnxruntime_perf_test in the folder `programs` of a phone, with a bundle's files in `model` there."""

    def __init__(self, runner: Runner, programs: str, model: str, bundle: Bundle, unit: str) -> None:
        self._runner, self._programs, self._model = runner, programs, model
        self._bundle, self._unit = bundle, unit
        self._peaks: dict[str, float] = {}
        self._loads: dict[str, float] = {}
        self._placed: dict[str, dict[str, int]] = {}

    def sweep(self, job: Job, tasks: Sequence[Task], at: float) -> Sweep:
        """Time all stages of all asks. Raises ProgramError, also where no node of a graph runs on the unit."""
        started = time.monotonic()
        out: list[Sample] = []
        for task in tasks:
            now = at + time.monotonic() - started
            times = {stage: self._time(job, stage, task) for stage in self._stages(task)}
            times["vision"] = [ms * task.counts.encoded_crops for ms in times["vision"]]
            out += samples(task.ask.name, now, times)
        facts: dict[str, Any] = {"peak_mb": self._peaks, "load_ms": self._loads, "notes": list(NOTES)}
        if self._placed:
            facts["nodes"] = self._placed
        return Sweep(tuple(out), facts, sum(self._loads.values()) if self._loads else None)

    def _stages(self, task: Task) -> tuple[str, ...]:
        return ("vision", "project", "prefill", *(("prompt",) if task.prompt else ()), "decode")

    def _graph(self, stage: str, task: Task) -> str:
        """The graph that vlmedge would use: the decoder's second copy for many positions, where there is one."""
        if stage in ("vision", "project"):
            return {"vision": "vision_encoder", "project": "vision_projection"}[stage]
        many = {"prefill": task.prefix, "prompt": task.prompt}.get(stage, 1) > PREFILL_OVER
        has_prefill = any(entry.path == f"onnx/{PREFILL}.onnx" for entry in self._bundle.manifest.files)
        return PREFILL if many and has_prefill else DECODER

    def _time(self, job: Job, stage: str, task: Task) -> list[float]:
        graph, dims = self._graph(stage, task), shapes(stage, task, self._bundle)
        if self._unit != "cpu" and graph not in self._placed:
            self._placed[graph] = self._place(job, graph, dims)
        ran = self._run(job, graph, dims, job.work.repeat)
        if ran.peak_mb is not None:
            self._peaks[graph] = max(ran.peak_mb, self._peaks.get(graph, 0.0))
        loaded = _LOADED.search(ran.stdout)
        if loaded:
            self._loads.setdefault(graph, float(loaded[1]) * 1e3)
        return read_times(ran.files.get(_RESULT, ""), job.work.repeat)

    def _place(self, job: Job, graph: str, dims: Mapping[str, int]) -> dict[str, int]:
        """Provider -> nodes of the graph that it runs: what a provider does not take, ONNX Runtime gives to the CPU."""
        ran = self._run(job, graph, dims, 1, "-p", f"{{run}}/{_PROFILE}")
        placed = read_profile(next((text for name, text in ran.files.items() if name.startswith(_PROFILE)), ""))
        if set(placed) <= {"CPUExecutionProvider"}:
            raise ProgramError("unavailable", f"no node of {graph}.onnx runs on {self._unit}; use --unit cpu")
        return placed

    def _run(self, job: Job, graph: str, dims: Mapping[str, int], repeat: int, *more: str) -> Ran:
        threads = job.variant.threads if job.variant is not None else None
        words = [f"{self._programs}/{PROGRAMS[0]}", "-I", "-m", "times", "-r", str(repeat), "-e", self._unit]
        words += ["-o", "99", "-x", str(threads or 0), *OPTIONS.get(self._unit, ()), *more]
        words += [word for name, size in dims.items() for word in ("-f", f"{name}:{size}")]
        words += [f"{self._model}/onnx/{graph}.onnx", f"{{run}}/{_RESULT}"]
        return self._runner.run(words, variables(self._programs), keep=(_RESULT, _PROFILE))


def variables(programs: str) -> dict[str, str]:
    """Where the phone finds the libraries, and its DSP the ones that QNN loads there."""
    return {"LD_LIBRARY_PATH": programs, "ADSP_LIBRARY_PATH": programs}


def read_times(text: str, repeat: int) -> list[float]:
    """Milliseconds from the result file: "model,seconds,peak bytes,cpu %,run" for each run, then statistics.

    Raises ProgramError for fewer runs than were asked for.
    """
    rows = (line.split(",") for line in text.splitlines())
    times = [float(row[1]) * 1e3 for row in rows if len(row) == 5 and row[4].strip().isdigit()]
    if len(times) != repeat:
        raise ProgramError("rubbish", f"onnxruntime_perf_test wrote {len(times)} of {repeat} times")
    return times


def read_profile(text: str) -> dict[str, int]:
    """Provider -> nodes, from ONNX Runtime's profile: a JSON list of events, those of kernels name their provider."""
    try:
        events = json.loads(text)
    except ValueError:
        raise ProgramError("rubbish", "onnxruntime_perf_test wrote no profile that tells what ran where") from None
    seen = {
        (event.get("name"), event["args"]["provider"])
        for event in events
        if isinstance(event, dict) and isinstance(event.get("args"), dict) and event["args"].get("provider")
    }
    return dict(Counter(provider for _, provider in seen))


def reason_of(path: Path, unit: str, said: str) -> str:
    """Why a unit cannot be used, from what the program said when it was asked for it."""
    if "not supported in this build" in said:
        return f"{path.name} was built without {unit}; build it with --use_{unit}"
    return f"{unit} does not work on this phone: {said}"
