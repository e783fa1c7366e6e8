"""How many questions of unseen pictures each profile's export answers as it should, beside the original.

    python benchmarks/demo_accuracy.py [--pictures 500] [--formats gguf onnx] [--profiles f32 q8 ...]

Prints a Markdown table (docs/profiles.md holds one) and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import vlmedge
from vlmedge.demo import demo_folder
from vlmedge.exporters import EXPORTERS
from vlmedge.quant_profiles import profiles_for

SOURCE = "demo:moondream2"
CHECKPOINT_MB = sum(path.stat().st_size for path in demo_folder("moondream2").glob("*.safetensors")) / 1e6
ORDER = ("f32", "f16", "q8", "w8a8", "q6", "q5", "q4", "q4_0", "q4-fast", "turbo", "q3")
ORIGINAL = ("original", "")


def measure(format_: str, name: str, folder: str, pictures: int, threads: int) -> dict[str, Any]:
    """Export one profile (format "original": nothing), ask everything, and return what came of it."""
    from vlmedge.demo.evaluate import evaluate, unseen

    start, row = time.perf_counter(), {"format": format_, "profile": name}
    source: str | Path = SOURCE
    if (format_, name) != ORIGINAL:
        bundle = vlmedge.export(SOURCE, format_, name, Path(folder) / f"{name}.{format_}", threads=threads)
        source = bundle.path
        row |= {"mb": bundle.bytes / 1e6, "bits_per_weight": bundle.manifest.profile.bits_per_weight}
        stages = {s["stage"]: s["relative_rms"] for s in bundle.manifest.verification["stages"] if s.get("against")}
        row["logits_rms"] = stages["logits"]
    with vlmedge.load(source, threads=threads) as model:
        row |= evaluate(model, unseen(pictures)).as_dict()
    return row | {"seconds": time.perf_counter() - start}


def main() -> None:
    """Measure all, two processes on two cores, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--formats", nargs="*", default=[*EXPORTERS])
    parser.add_argument("--profiles", nargs="*", default=ORDER)
    given = parser.parse_args()
    names = [ORIGINAL, *((f, p) for f in given.formats for p in given.profiles if p in profiles_for(f))]
    with tempfile.TemporaryDirectory() as folder:
        # A thread each: small models lose more by waiting for a second thread than they win.
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
            futures = {pool.submit(measure, *name, folder, given.pictures, 1): name for name in names}
            for future in as_completed(futures):
                row = future.result()
                told = f"{row['format']} {row['profile']}: {row['exact']:.2%} exact, {row['seconds']:.0f} s"
                print(told, file=sys.stderr, flush=True)
        rows = [future.result() for future in sorted(futures, key=lambda f: names.index(futures[f]))]
    base = rows[0]
    print(f"{given.pictures} pictures, {base['questions']} questions\n")
    columns = (
        "format",
        "profile",
        "MB",
        "bits per weight",
        "logits, relative RMS",
        "exact answers",
        "mean IoU",
        "box hits",
    )
    print(f"| {' | '.join(columns)} | point hits |")
    print("|" + "---|" * (len(columns) + 1))
    for row in rows:
        size = (
            f"{row['mb']:.1f} | {row['bits_per_weight']:.2f} | {row['logits_rms']:.1e}"
            if "mb" in row
            else "7.9 (bf16) | 16 | -"
        )
        print(
            f"| {row['format']} | {row['profile']} | {size} | {row['exact']:.2%} | {row['mean_iou']:.3f} | "
            f"{row['detect_hits']:.2%} | {row['point_hits']:.2%} |"
        )
    print(json.dumps({"pictures": given.pictures, "rows": rows}))


if __name__ == "__main__":
    main()
