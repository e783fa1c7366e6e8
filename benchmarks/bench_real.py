"""`vlmedge bench` at real size: moondream2's shape with random weights, the original beside exports of it.

Writes the checkpoint (bf16, 3.9 GB) and the exports into `--work` where they are not there yet, and runs the command:

    python benchmarks/bench_real.py --work /tmp/real

Weights are random: speed and memory are facts, agreement shows that the machinery works and nothing of a trained model.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from real_size import Size, say, write_moondream

EXPORTS = ("onnx q4", "onnx q8", "onnx w8a8", "gguf q4", "gguf q8")


def vlmedge(*arguments: object) -> None:
    """Run a command line."""
    subprocess.run([sys.executable, "-m", "vlmedge", *map(str, arguments)], check=True)


def main() -> None:
    """Read the command line, make what is missing, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/vlmedge-real"))
    parser.add_argument("--exports", nargs="+", default=EXPORTS, metavar="'FORMAT PROFILE'")
    args, options = parser.parse_known_args()
    checkpoint = args.work / "ck"
    if not checkpoint.is_dir():
        write_moondream(checkpoint, Size())
    bundles = []
    for words in args.exports:
        format_, profile = words.split()
        bundles.append(args.work / f"real-{profile}.{format_}")
        if not bundles[-1].is_dir():
            say(f"exporting {bundles[-1].name}")
            vlmedge("export", checkpoint, "--format", format_, "--quant", profile, "--out", bundles[-1], "--no-verify")
    vlmedge("bench", *bundles, "--original", checkpoint, "--out", args.work / "bench", *options)


if __name__ == "__main__":
    main()
