"""Records of a run that never was, as a real one would look: originals, exports, failures, anchors, minutes of load."""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass, replace
from statistics import median

from vlmedge.device_bench.job import Ask, Job, Variant, Work
from vlmedge.device_bench.result import (
    SCHEMA,
    Agreement,
    AskAgreement,
    Ceiling,
    Costs,
    Counts,
    Energy,
    Load,
    Memory,
    Record,
    Reply,
    Sample,
)

ASKS = (
    Ask("cat, short", "/images/cat.png", "a" * 64, 378, 378, "What is this?"),
    Ask("street", "/images/street.jpg", "b" * 64, 1024, 768, "What is written on the sign to the left of the door?"),
    Ask("caption", "/images/wide.jpg", "c" * 64, 1600, 900, ""),
)
CROPS = {"cat, short": 2, "street": 13, "caption": 9}
WORK = Work("standard", ASKS, 32, 1, 3, 2.0)
ENVIRONMENT = {
    "cpu": "AMD EPYC 7R13 Processor",
    "machine": "x86_64",
    "cores": 2,
    "flags": ["avx2", "f16c", "fma"],
    "affinity": [0, 1],
    "ram_mb": 8200,
    "load": [0.1, 0.3, 0.4],
    "system": "Debian GNU/Linux 12 (bookworm)",
    "kernel": "Linux 6.1.0",
    "governor": "performance",
    "python": "3.11.9",
    "vlmedge": "0.1.0",
    "packages": {"llama-cpp-python": "0.3.36", "onnxruntime": "1.32.0", "torch": "2.13.0"},
    "commit": "25367e42b12c20b1211011b8ba9668516da29f2f",
    "dirty": False,
}


@dataclass(frozen=True)
class Kind:
    """How a variant behaves: milliseconds a crop and a token, MB, bytes read per token, agreement."""

    variant: Variant
    crop: float = 1.0
    token: float = 1.0
    peak: float = 1.0
    read: float = 1.0
    top1: float = 1.0
    status: str = "ok"
    reason: str = ""


def variant(label, format, profile, gb, bits, runtime, unit="cpu", dtype=""):
    digest = hashlib.sha256(label.encode()).hexdigest()
    return Variant(label, f"/models/{label}", digest, format, profile, int(gb * 1e9), bits, runtime, unit, dtype)


GPU_MISSING = "onnxruntime has no cuda here; install onnxruntime-gpu and an NVIDIA driver"
NO_MEMORY = "the process was ended by the system: it had 7.9 GB of 8.2 GB"
KINDS = (
    Kind(variant("original f32", "checkpoint", "", 3.85, None, "torch", dtype="float32"), 1450, 410, 8400, 5.7e9),
    Kind(
        variant("original bf16", "checkpoint", "", 3.85, None, "torch", dtype="bfloat16"), 980, 230, 4600, 2.9e9, 0.99
    ),
    Kind(variant("moondream2-w8a8.onnx", "onnx", "w8a8", 2.01, 8.2, "onnxruntime"), 520, 118, 2900, 1.5e9, 0.978),
    Kind(variant("moondream2-q4.onnx", "onnx", "q4", 1.19, 4.6, "onnxruntime"), 890, 84, 2250, 0.92e9, 0.951),
    Kind(variant("moondream2-q4.gguf", "gguf", "q4", 1.093, 4.61, "llamacpp"), 640, 61, 1820, 0.86e9, 0.957),
    Kind(variant("moondream2-q8.gguf", "gguf", "q8", 2.04, 8.5, "llamacpp"), 610, 104, 2760, 1.55e9, 0.995),
    Kind(variant("wrong-mask-q4.gguf", "gguf", "q4", 1.093, 4.61, "llamacpp"), 470, 60, 1820, 0.86e9, 0.31),
    Kind(
        variant("moondream2-f32.onnx", "onnx", "f32", 7.7, 32.0, "onnxruntime"),
        status="out_of_memory",
        reason=NO_MEMORY,
    ),
    Kind(
        variant("moondream2-q4.onnx on cuda", "onnx", "q4", 1.19, 4.6, "onnxruntime", "cuda"),
        status="unavailable",
        reason=GPU_MISSING,
    ),
)


def sample(rng, kind, ask, at, slow=1.0):
    def near(ms, spread=0.015):
        return ms * slow * math.exp(rng.gauss(0, spread))

    crops = CROPS[ask.name]
    parts = {
        "image": near(2 + ask.width / 100),
        "preprocess": near(3.0 * crops),
        "vision": near(kind.crop * crops),
        "project": near(kind.crop / 25),
        "tokenize": near(0.2),
        "prefill": near(kind.crop * 2.1),
        "prompt": near(kind.token * 1.4),
    }
    tokens = tuple(near(kind.token, 0.03) for _ in range(WORK.tokens - 1))
    first = sum(parts.values()) + near(1.0)
    ms = {
        **parts,
        "first_token": first,
        "decode": sum(tokens) / len(tokens),
        "detokenize": near(0.4),
        "next_first_token": near(kind.token * 1.5),
        "end_to_end": first + sum(tokens),
    }
    return Sample(ask.name, at, ms, tokens)


def agreement(kind):
    answers = tuple(
        AskAgreement(a.name, None if kind.top1 > 0.96 else 7, kind.top1, (1 - kind.top1) / 8, kind.top1 > 0.96, "a cat")
        for a in ASKS
    )
    same = sum(a.same_answer for a in answers) / len(answers)
    return Agreement(answers, 32 * len(ASKS), kind.top1, (1 - kind.top1) / 8, same, "d" * 64)


CEILING = Ceiling(2, 17.2, {"f32": 92.0, "int8": 240.0})


def reply(rng, kind, round, slow=1.0, others=0.02):
    if kind.status != "ok":
        return Reply(kind.status, kind.reason, environment=ENVIRONMENT)
    slow *= math.exp(rng.gauss(0, 0.02))  # a process of its own
    samples = [sample(rng, kind, ask, 0.0, slow) for _ in range(WORK.repeat) for ask in ASKS]
    costs = Costs(2.6e10, 0.15e12, kind.read, 9.1e7)
    base = 310.0 if kind.variant.runtime == "torch" else 96.0
    peak = kind.peak * math.exp(rng.gauss(0, 0.004))
    return Reply(
        "ok", "",
        Load(1900 if round == 1 else 420, 350, "cold" if round == 1 else "warm"),
        tuple(samples),
        tuple(Counts(a.name, CROPS[a.name], CROPS[a.name] - (a.name == "cat, short"), 730, 14, 32) for a in ASKS),
        Memory(base, peak * 0.8, peak, peak * 0.4, peak * 0.5, None),
        Energy(None, None, 20.0, "", "no counter: /sys/class/powercap is not readable; run as root or allow it"),
        agreement(kind), costs, None, others, 2, ENVIRONMENT,
    )  # fmt: skip


def started(second):
    return f"2026-11-24T{9 + second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d}+00:00"


def record(kind, round, second, answer, job_kind="measure", work=WORK, **more):
    job = Job(job_kind, "local", work, round, kind.variant if kind else None, "/out/truth.json", round == 1)
    return Record(
        SCHEMA, "20261124-090000", job.id if kind else f"anchor{second:010d}", job_kind, "local", "local", round,
        kind.variant if kind else None, work, started(second), 58.0, answer, **more,
    )  # fmt: skip


def anchor(second, slow=1.0):
    gemm = {kind: rate / slow**2 for kind, rate in CEILING.gemm.items()}
    ceiling = replace(CEILING, bandwidth=CEILING.bandwidth / slow, gemm={**gemm, "int8": gemm["int8"] / slow**2})
    return record(None, 1, second, Reply("ok", ceiling=ceiling, threads=2, environment=ENVIRONMENT), "anchor")


def measured(rng, kind, round, second, slow=1.0, drift=0.01, **more):
    answer = reply(rng, kind, round, slow)
    if kind.status != "ok":
        return record(kind, round, second, answer, drift=drift, **more)
    middle = {stage: median(s.ms[stage] for s in answer.samples) for stage in ("decode", "vision", "prefill")}
    reached = {
        "decode": (kind.read + 9.1e7) / middle["decode"] / 17.2e6,
        "vision": 9 * 2.6e10 / middle["vision"] / 240e6,
        "prefill": 0.15e12 / middle["prefill"] / 240e6,
    }
    return record(kind, round, second, answer, ceiling=CEILING, reached=reached, drift=drift, **more)


def run(kinds=KINDS, rounds=3, seed=0, slow=None, again=True):
    """A run's records; `slow` makes a label's variant so many times slower."""
    rng, found, second = random.Random(seed), [anchor(0)], 60
    found.append(record(kinds[0], 1, 30, Reply("ok", environment=ENVIRONMENT), "reference"))
    for round in range(1, rounds + 1):
        for i, kind in enumerate(kinds if round % 2 else kinds[::-1]):
            if i % 4 == 3:
                found.append(anchor(second, 1 + 0.02 * rng.random()))
            by = (slow or {}).get(kind.variant.label, 1.0)
            found.append(measured(rng, kind, round, second + 2, by))
            second += 61
    if again:  # one process met a slow machine, and was run again
        last = max(i for i, r in enumerate(found) if r.reply.samples)
        kind = next(k for k in kinds if k.variant == found[last].variant)
        found[last] = measured(rng, kind, rounds, second, 1.6, 0.31)
        found.append(measured(rng, kind, rounds, second + 90, again=1))
    return [*found, anchor(second + 200, 1.03)]


def minutes(kinds=(KINDS[3], KINDS[4], KINDS[5]), count=20, seed=1):
    """Sustain records: the one that heats the machine most slows down most."""
    rng = random.Random(seed)
    work = replace(WORK, minutes=float(count))
    for i, kind in enumerate(kinds):
        at, samples = 0.0, []
        while at < count * 60:
            slow = 1 + (0.75 if i == 1 else 0.12) * (1 - math.exp(-at / 400))
            samples.append(sample(rng, kind, ASKS[len(samples) % 3], at, slow))
            at += samples[-1].ms["end_to_end"] / 1000
        answer = replace(reply(rng, kind, 1), samples=tuple(samples))
        yield record(kind, 1, 7200 + i * 1300, answer, "sustain", work)
