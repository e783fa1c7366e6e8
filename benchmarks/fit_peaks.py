"""The peaks that `vlmedge fit` predicts beside measured ones: fresh processes that open a bundle and answer once.

A case is a bundle, a memory mode, a context and a number of crops. Its process imports vlmedge, opens the bundle, asks
one question about a picture that cuts into so many crops, and tells its highest resident set (VmHWM on Linux). Bundles
are exported to `--work` where they are not there yet, and not verified; `--size real` makes them of moondream2's shape
with random weights (1.93 billion; each profile takes 1.4 to 7.7 GB of disk). An ONNX bundle with memory "lean" is
opened twice: the first time it prepares files. The last line of the output is one JSON object.

    python benchmarks/fit_peaks.py
    python benchmarks/fit_peaks.py --size real --bundles gguf:q4 gguf:q8 onnx:q4 onnx:w8a8 --crops 1 13

A smoke test:

    python benchmarks/fit_peaks.py --bundles gguf:q4 onnx:w8a8 --crops 2
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from real_size import Size, machine, say, write_moondream

from vlmedge.bundle import Bundle, open_bundle
from vlmedge.device_bench.footprint import Use, footprint
from vlmedge.imaging import tiling_of
from vlmedge.pipeline import export
from vlmedge.spec import ImageSpec

DEMO = (
    *(f"gguf:{profile}" for profile in ("f32", "f16", "q8", "q5", "q4", "q4_0", "q3")),
    *(f"onnx:{profile}" for profile in ("f32", "f16", "q8", "q4", "q4-fast", "w8a8", "w8a8-kv8", "turbo")),
    *(f"onnx:{profile}:portable" for profile in ("f32", "q4", "w8a8")),
)
REAL = ("gguf:q4", "gguf:q8", "onnx:q4", "onnx:w8a8", "onnx:f16")
QUESTION = 20  # positions of the template and the question
CHILD = """
import json, resource, sys
from pathlib import Path
import vlmedge
source, memory, context, picture, threads, tokens = json.loads(sys.argv[1])
with vlmedge.load(source, memory=memory, context=context, threads=threads) as model:
    model.query(picture, "What is in the picture?", max_tokens=tokens)
status = Path("/proc/self/status")
if status.is_file():  # getrusage would count what the parent had before exec
    print(next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM")))
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


@dataclass(frozen=True, slots=True)
class Case:
    """What a process does. `prepared`: an earlier one has prepared this machine's files."""

    bundle: str
    memory: str
    context: int
    crops: int
    prepared: bool = False


@dataclass(frozen=True, slots=True)
class Peak:
    """A case's bytes, and the part of the prediction that the system could drop."""

    case: Case
    measured: float
    predicted: float
    mapped: float
    stage: str

    @property
    def ratio(self) -> float:
        """Predicted by measured."""
        return self.predicted / self.measured


def main() -> None:
    """Measure every case, and print the table and the JSON object."""
    args = _arguments()
    peaks = []
    for case in _cases(args):
        peaks.append(_peak(case, args))
        say(_line(peaks[-1]))
    print("\n".join(table(peaks)))
    worst = max(abs(peak.ratio - 1) for peak in peaks)
    print(f"{len(peaks)} peaks, the worst prediction is off by {worst:.1%}")
    rows = [asdict(peak) | {"ratio": round(peak.ratio, 4)} for peak in peaks]
    print(json.dumps({"machine": machine(), "threads": args.threads, "peaks": rows}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("demo", "real"), default="demo")
    parser.add_argument("--bundles", nargs="+", metavar="FORMAT:PROFILE[:FLAVOUR]")
    parser.add_argument("--memory", nargs="+", choices=("fast", "lean"), default=["fast", "lean"])
    parser.add_argument("--context", nargs="+", type=int, default=[0], help="0: the model's own")
    parser.add_argument("--crops", nargs="+", type=int, help="[default: 1 and 5, at real size 1]")
    parser.add_argument("--tokens", type=int, default=4, help="of an answer; as many as the context takes fill it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("fit_peaks"), help="where bundles, pictures and caches lie")
    args = parser.parse_args()
    args.bundles = args.bundles or (REAL if args.size == "real" else DEMO)
    args.crops = args.crops or ([1] if args.size == "real" else [1, 5])
    return args


def _cases(args: argparse.Namespace) -> Iterator[Case]:
    for word in args.bundles:
        for memory in args.memory:
            for number, (context, crops) in enumerate((c, n) for c in args.context for n in args.crops):
                if word.startswith("onnx") and memory == "lean":
                    if not number and not _is_prepared(word, args):
                        yield Case(word, memory, context, crops)
                    yield Case(word, memory, context, crops, prepared=True)
                else:
                    yield Case(word, memory, context, crops)


def _is_prepared(word: str, args: argparse.Namespace) -> bool:
    mark = args.work / f"{args.size}-{word.replace(':', '-')}.prepared"
    known = mark.is_file()
    args.work.mkdir(parents=True, exist_ok=True)
    mark.touch()
    return known


def _peak(case: Case, args: argparse.Namespace) -> Peak:
    bundle = _bundle(case.bundle, args)
    model = bundle.manifest.model
    picture, megapixels = _picture(model.image, case.crops, args.work)
    context = case.context or model.decoder.context
    words = [str(bundle.path), case.memory, context, str(picture), args.threads, args.tokens]
    measured = measure(words, args.work)
    use = Use(
        context=context,
        crops=case.crops,
        positions=1 + model.image_tokens + QUESTION + args.tokens,
        megapixels=megapixels,
        memory="lean" if case.memory == "lean" else "fast",
        prepared=case.prepared,
    )
    peak = footprint(bundle.manifest, use).peak
    return Peak(case, measured, peak.bytes, peak.bytes - peak.held, peak.name)


def measure(words: list[str | int], work: Path) -> float:
    """The highest resident set, in bytes, of a fresh process that is told these words."""
    environment = os.environ | {"XDG_CACHE_HOME": str((work / "cache").resolve())}
    command = [sys.executable, "-c", CHILD, json.dumps(words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{words}: {done.stderr[-1000:]}")
    return float(done.stdout.splitlines()[-1])


def _bundle(word: str, args: argparse.Namespace) -> Bundle:
    format, profile, *flavour = word.split(":")
    folder = args.work / f"{args.size}-{word.replace(':', '-')}"
    if not folder.is_dir():
        say(f"exporting {folder}")
        source = str(_checkpoint(args)) if args.size == "real" else "demo:moondream2"
        export(source, format, profile, folder, flavour=next(iter(flavour), None), verify=False, threads=args.threads)
    return open_bundle(folder)


def _checkpoint(args: argparse.Namespace) -> Path:
    folder: Path = args.work / "moondream2"
    if not (folder / "model.safetensors").is_file():
        write_moondream(folder, Size())
    return folder


def _picture(image: ImageSpec, crops: int, work: Path) -> tuple[Path, float]:
    """A PNG that is encoded as so many crops, and its size in megapixels."""
    height, width = _smallest(image, crops)
    path: Path = work / f"picture-{height}x{width}.png"
    if not path.is_file():
        noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(noise).resize((width, height)).save(path)
    return path, height * width / 1e6


def _smallest(image: ImageSpec, crops: int) -> tuple[int, int]:
    margin = image.patch_size * image.tiling.margin
    window = image.size - 2 * margin
    grids = [(rows, (crops - 1) // rows) for rows in range(1, crops) if not (crops - 1) % rows]
    sizes = [(rows * window + 2 * margin, columns * window + 2 * margin) for rows, columns in grids]
    fits = [size for size, grid in zip(sizes, grids, strict=True) if grid != (1, 1) and tiling_of(*size, image) == grid]
    if crops == 1:
        return image.size, image.size
    if not fits:
        raise SystemExit(f"no picture is encoded as {crops} crops of {image.size} pixels")
    return min(fits, key=lambda size: size[0] * size[1])


def table(peaks: list[Peak]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield "| bundle | memory | context | crops | measured, MB | predicted, MB | of it mapped | at | ratio |"
    yield "|---|---|---|---|---|---|---|---|---|"
    yield from map(_line, peaks)


def _line(peak: Peak) -> str:
    case = peak.case
    memory = f"{case.memory}, prepared" if case.prepared else case.memory
    cells: list[Any] = [case.bundle, memory, case.context or "all", case.crops]
    cells += [f"{peak.measured / 1e6:.0f}", f"{peak.predicted / 1e6:.0f}", f"{peak.mapped / 1e6:.0f}"]
    return f"| {' | '.join(map(str, [*cells, peak.stage, f'{peak.ratio:.2f}']))} |"


if __name__ == "__main__":
    main()
