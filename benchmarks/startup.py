"""What it costs to start: CPU time (user + system) of `vlmedge --help` and of the light verbs, in fresh processes.

Wall time depends on the machine's load, CPU time hardly does. The last line of the output is one JSON object:
median and best of every command in seconds, and of an empty Python beside them.

    python benchmarks/startup.py --rounds 10
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

COMMANDS = {
    "python": ["-c", "pass"],
    "--help": ["-m", "vlmedge", "--help"],
    "export --help": ["-m", "vlmedge", "export", "--help"],
    "profiles": ["-m", "vlmedge", "profiles"],
    "models": ["-m", "vlmedge", "models"],
    "doctor": ["-m", "vlmedge", "doctor"],
}
LIMIT = 0.3  # seconds that `vlmedge --help` may take


def main() -> None:
    """Measure in turn, so that a busy moment of the machine hits all alike."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    samples: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(rounds + 1):
        for name, words in COMMANDS.items():
            spent = cpu_seconds(words)
            if number:  # the first round fills the disk cache and writes .pyc files
                samples[name].append(spent)
    for name, found in samples.items():
        print(f"{name:15} median {statistics.median(found):.3f} s, best {min(found):.3f} s", file=sys.stderr)
    verdict = statistics.median(samples["--help"]) < LIMIT
    result = {name: {"median": round(statistics.median(s), 4), "best": round(min(s), 4)} for name, s in samples.items()}
    print(json.dumps({"cpu_seconds": result, "rounds": rounds, "limit": LIMIT, "help_within_limit": verdict}))
    sys.exit(0 if verdict else 1)


def cpu_seconds(words: list[str]) -> float:
    """User and system time of one child process."""
    before = os.times()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return (after.children_user - before.children_user) + (after.children_system - before.children_system)


if __name__ == "__main__":
    main()
