"""False alarms: every format, flavour and profile verified over random weights and pictures; none may fail.

    python benchmarks/gate.py [--seeds 10] [--formats gguf onnx] [--profiles q8 ...] [--models small wide ...]

Prints the worst and the median relative RMS of every stage beside its limit, what became of ties, the worst rounding
of every stored type, and every failure. The limits in quant_profiles/profiles/ come from here. A model is one of
`MODELS`, whose weights a seed draws, or anything that `export` takes: then a seed draws the pictures alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

import vlmedge
from vlmedge.checkpoint import Checkpoint, Source
from vlmedge.exporters import EXPORTERS, Readback
from vlmedge.families import FAMILIES
from vlmedge.loading import describe
from vlmedge.parity.verify import verify
from vlmedge.parity.weights import compare_weights
from vlmedge.quant_profiles import profiles_for
from vlmedge.records import encode
from vlmedge.session import F32, U8
from vlmedge.spec import Shape

DATA = Path(__file__).parent.parent / "tests/data"
# A checkpoint of each family whose scales the drawn ones have.
PATTERNS = {"moondream2": DATA / "moondream2/tiny-mha"}
# Crops of 112 pixels in place of 378.
_SHORT = {"crop_size": 112, "max_crops": 6, "overlap_margin": 1}
# What is changed in the pattern's config. "small" has its shape; rows of "wide" are two blocks of 256 and several of
# 128, so that K-quants and wide blocks come into use; "tiny" takes the least time.
MODELS: dict[str, dict[str, dict[str, dict[str, int]]]] = {
    "small": {},
    "wide": {
        "moondream2": {
            "text": {"dim": 512, "ff_dim": 1024, "n_layers": 2, "n_heads": 8, "n_kv_heads": 8, "max_context": 512},
            "vision": {"enc_dim": 256, "enc_ff_dim": 512, "enc_n_layers": 3, "enc_n_heads": 4, "proj_inner_dim": 512}
            | {"proj_out_dim": 512, **_SHORT},
            "region": {"dim": 512, "inner_dim": 256},
        }
    },
    "tiny": {"moondream2": {"text": {"n_layers": 2, "max_context": 512}, "vision": {"enc_n_layers": 2, **_SHORT}}},
}
_UNUSED = -7.5  # a head's bias of ids that no tokenizer has


@dataclass(frozen=True, slots=True)
class Task:
    """One export to verify: `source` is a folder or a name."""

    model: str
    seed: int
    source: str
    format: str
    flavour: str
    profile: str


def draw(folder: Path, model: str, seed: int, family: str = "moondream2") -> Path:
    """Write a checkpoint of random weights: every tensor has its pattern's mean and spread.

    Even seeds give bf16, as releases are; odd ones float32, of which f16 loses something.
    """
    import torch
    from safetensors.torch import save_file

    pattern, entry = describe(PATTERNS[family]), FAMILIES[family]
    config = dict(pattern.checkpoint.config)
    changed = MODELS[model].get(family, {})
    config["config"] = {key: value | changed.get(key, {}) for key, value in config["config"].items()}
    spec = entry.spec(Checkpoint(Source(model), folder, config, {}))
    rng = np.random.default_rng(seed)
    made = {
        name: _drawn(rng, shape, pattern.tensors[_alike(name, pattern.tensors)].read())
        for name, shape in spec.tensors().items()
    }
    folder.mkdir(parents=True)
    dtype = torch.float32 if seed % 2 else torch.bfloat16
    upstream = entry.weights(spec).inverse(made)
    save_file({name: torch.from_numpy(a).to(dtype) for name, a in upstream.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes(pattern.tokenizer)
    return folder


def _alike(name: str, known: Iterable[str]) -> str:
    """The pattern's tensor: that of the same layer, or of its first where it has fewer."""
    return name if name in known else re.sub(r"\.layers\.\d+\.", ".layers.0.", name)


def _drawn(rng: np.random.Generator, shape: Shape, pattern: F32) -> F32:
    """Normal values; a product's sum is as large as the pattern's, however many terms it has."""
    if len(shape) < 2:
        unused, known = pattern <= _UNUSED, pattern[pattern > _UNUSED]
        values = rng.normal(known.mean(), known.std(), shape)
        return np.where(unused, pattern, values).astype(np.float32) if unused.any() else values.astype(np.float32)
    columns = [int(np.prod(s[1:])) for s in (shape, pattern.shape)]
    spread = float(pattern.std()) * (columns[1] / columns[0]) ** 0.5
    return rng.normal(pattern.mean(), spread, shape).astype(np.float32)


def pictures(seed: int, size: int) -> dict[str, U8]:
    """Pictures for a tower of `size` pixels: smooth, noise and edges as text has them, of random heights and widths."""
    rng = np.random.default_rng(seed)
    kinds = {"smooth": _smooth, "noise": _noise, "text": _text}
    return {name: make(rng, *_extent(rng, size)) for name, make in kinds.items()}


def _extent(rng: np.random.Generator, size: int) -> tuple[int, int]:
    """From a quarter of a crop to one and a half."""
    height, width = (size * 2 ** rng.uniform(-2, 0.6, 2)).astype(int)
    return max(8, int(height)), max(8, int(width))


def _smooth(rng: np.random.Generator, height: int, width: int) -> U8:
    y, x = np.mgrid[0:height, 0:width][:, :, :, None]
    waves = [np.sin(y * a / height + x * b / width + c) for a, b, c in rng.uniform(-6, 6, (4, 3, 3))]
    return (127.5 + 31 * np.sum(waves, axis=0)).astype(np.uint8)


def _noise(rng: np.random.Generator, height: int, width: int) -> U8:
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def _text(rng: np.random.Generator, height: int, width: int) -> U8:
    """Dark strokes in lines on bright paper."""
    page = np.full((height, width, 3), rng.integers(200, 256, 3), np.uint8)
    for top in range(4, height - 6, 12):
        for left in range(4, width - 6, 6):
            strokes = rng.random((7, 4)) < 0.45
            page[top : top + 7, left : left + 4][strokes[: height - top, : width - left]] = rng.integers(0, 80)
    return page


def tasks(models: Iterable[str], seeds: int, formats: Iterable[str], profiles: Iterable[str], work: Path) -> list[Task]:
    """Every export of every model and seed; the checkpoints are written."""
    out = []
    for seed in range(seeds):
        for model in models:
            source = str(draw(work / f"{model}-{seed}", model, seed)) if model in MODELS else model
            out += [Task(model, seed, source, *way) for way in ways(formats, profiles)]
    return out


def ways(formats: Iterable[str], profiles: Iterable[str] = ()) -> Iterator[tuple[str, str, str]]:
    """Format, flavour and profile of everything that can be exported."""
    chosen = set(profiles)
    for format_ in formats:
        for flavour in EXPORTERS[format_].flavours:
            for name in profiles_for(format_):
                if name in chosen or not chosen:
                    yield format_, flavour, name


def measure(task: Task, work: str, own: int = 3) -> dict[str, Any]:
    """Export, verify with `own` pictures, and return the report's stages and the rounding of every stored type."""
    start, found = time.perf_counter(), describe(task.source)
    out = Path(work) / "-".join((task.model.replace("/", "_"), str(task.seed), *_way(task)))
    name, options = task.profile, {"flavour": task.flavour or None, "verify": False, "threads": 1}
    bundle = vlmedge.export(task.source, task.format, name, out, **options)
    seen = dict(list(pictures(task.seed, found.spec.image.size).items())[:own])
    report = verify(bundle.path, task.source, seen, threads=1)
    types = _types(task, found.tensors, EXPORTERS[task.format].read(found.spec, bundle.path))
    shutil.rmtree(out)
    stages = [encode(stage) for stage in report.stages]
    row = {"model": task.model, "seed": task.seed, "way": ":".join(_way(task)), "profile": name}
    return row | {"stages": stages, "types": types, "passed": report.passed, "seconds": time.perf_counter() - start}


def _way(task: Task) -> tuple[str, ...]:
    return tuple(filter(None, (task.format, task.flavour, task.profile)))


def _types(task: Task, original: Mapping[str, Any], stored: Readback) -> dict[str, float]:
    """Worst RMS of a group, in steps of its grid, by the format's own type; "+": two stored arrays are added up."""
    encodings = vlmedge.plan(task.source, task.format, task.profile, flavour=task.flavour or None).encodings
    groups: dict[str, list[str]] = {}
    for name, grain in stored.grains.items():
        groups.setdefault(encodings[name].type + "+" * (grain.pieces - 1), []).append(name)
    out = {}
    for kind, names in groups.items():
        parts = [{name: known[name] for name in names} for known in (stored.tensors, stored.grains)]
        some = replace(stored, tensors=parts[0], grains=parts[1])
        out[kind] = (compare_weights(original, some, 1).numbers or {}).get("steps_rms", float("inf"))
    return out


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown: of every profile, format and stage the worst and the median by model, the limit, and ties."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    yield f"| profile | format | stage | against | limit | {' | '.join(models)} | ties | worst / limit |"
    yield "|" + "---|" * (len(models) + 7)
    for way in sorted({row["way"] for row in rows}, key=lambda way: way.split(":")[::-1]):
        some = [row for row in rows if row["way"] == way]
        for i, first in enumerate(some[0]["stages"]):
            if first["against"] is None:
                continue
            by = {m: [row["stages"][i] for row in some if row["model"] == m] for m in models}
            values = {m: [s["relative_rms"] or 0.0 for s in found] for m, found in by.items()}
            worst, ties = max(map(max, values.values())), sum(s["ambiguous"] for found in by.values() for s in found)
            cells = [f"{max(v):.1e} ({statistics.median(v):.1e})" for v in values.values()]
            limit = first["limit"]
            told = ("-", "-") if limit is None else (f"{limit:.1e}", f"{worst / limit:.2f}")
            format_, profile = way.rpartition(":")[::2]
            lead = (profile, format_, first["stage"], first["against"], told[0])
            yield f"| {' | '.join(lead)} | {' | '.join(cells)} | {ties} | {told[1]} |"


def rounding(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The worst RMS of every stored type over all rows, in steps."""
    out: dict[str, float] = {}
    for row in rows:
        for kind, worst in row["types"].items():
            name = f"{row['way'].partition(':')[0]} {kind}"
            out[name] = max(out.get(name, 0.0), worst)
    return dict(sorted(out.items()))


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """A line for every stage that failed."""
    return [
        f"{row['model']} seed {row['seed']} {row['way']}: {s['stage']} ({s['against'] or 'check'}): {s['why']}"
        for row in rows
        for s in row["stages"]
        if s["outcome"] == "failed"
    ]


def main() -> None:
    """Measure all, two processes of one thread, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--formats", nargs="*", default=[*EXPORTERS])
    parser.add_argument("--profiles", nargs="*", default=[], help="default: all")
    parser.add_argument("--models", nargs="*", default=[*MODELS])
    parser.add_argument("--pictures", type=int, default=3, help="of three kinds, beside verification's own two")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="append every run's numbers here, a line each")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="gate-") as work:
        todo = tasks(given.models, given.seeds, given.formats, given.profiles, Path(work))
        with ProcessPoolExecutor(given.processes, mp_context=get_context("spawn")) as pool:
            for row in pool.map(partial(measure, work=work, own=given.pictures), todo):
                rows.append(row)
                if given.json:
                    with given.json.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                for line in failures([row]):
                    print(f"FAILED {line}", file=sys.stderr, flush=True)
                if len(rows) % 20 == 0:
                    print(f"{len(rows)} of {len(todo)}", file=sys.stderr, flush=True)
    rows.sort(key=lambda row: (row["way"], row["model"], row["seed"]))
    print("\n".join(table(rows)))
    print("\nworst group of each stored type, RMS in steps of its grid")
    print("\n".join(f"{kind}: {worst:.3f}" for kind, worst in rounding(rows).items()))
    failed = failures(rows)
    print("\n".join(["", *failed, f"{len(rows)} exports verified, {sum(not row['passed'] for row in rows)} failed"]))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
