"""Times per stage of one bundle, native and in WASM: `python -m tests.web.measure BUNDLE...` from the repository.

One table row per bundle, place and number of threads: ms of the fastest round, because what else the machine does only
ever adds. Vision is all four crops of `wide.png`, token the mean over an answer. The page's tokens must be the native.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tests.browser import Browser, chromium
from tests.web import jobs
from vlmedge.demo import questions
from vlmedge.loading import load
from vlmedge.session import Session

T = TypeVar("T")
STAGES = ("vision", "project", "prefill", "prompt", "token")
PICTURE = Path(questions.__file__).parent / "pictures/wide.png"


def native(bundle: Path, asked: jobs.Asked, pixels: Path) -> dict[str, list[float]]:
    """Milliseconds of each stage, as the page measures them, in this process."""
    job = asked.job
    with load(bundle, threads=job["threads"]) as model:
        size = model.spec.image.size
        crops = np.fromfile(pixels, np.uint8).reshape(job["crops"], size, size, 3)
        times: dict[str, list[float]] = {stage: [] for stage in STAGES}
        for _ in range(job["rounds"]):
            _round(model.session, crops, job, asked.picture, times)
    return times


def _round(
    session: Session, crops: np.ndarray, job: dict[str, Any], answers: list[list[int]], times: dict[str, list[float]]
) -> None:
    def timed(stage: str, work: Callable[[], T], share: int = 1) -> T:
        start = time.perf_counter()
        result = work()
        times[stage].append((time.perf_counter() - start) * 1e3 / share)
        return result

    session.rewind(0)
    features = timed("vision", lambda: session.vision(crops))
    rows = timed("project", lambda: session.project(features, tuple(job["tiling"])))
    bos = session.embed(np.array([job["bos"]], np.int32))
    timed("prefill", lambda: session.forward(np.concatenate([bos, rows]), bidirectional=True))
    kept = session.position
    for prompt, answer in zip(job["prompts"], answers, strict=True):
        session.rewind(kept)
        timed("prompt", lambda prompt=prompt: session.forward(np.array(prompt, np.int32)))
        fed = answer[:-1]
        timed("token", lambda fed=fed: [session.forward(np.array([t], np.int32)) for t in fed], len(fed))


def main() -> None:
    """Measure every bundle that was named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    jobs.install()
    with chromium() as browser, tempfile.TemporaryDirectory() as scratch:
        for bundle in given.bundles:
            for threads in (1, 2):
                _measure(browser, bundle, Path(scratch), threads, given.rounds)


def _measure(browser: Browser, bundle: Path, scratch: Path, threads: int, rounds: int) -> None:
    asked = jobs.ask(bundle, PICTURE, "What is in the picture?", scratch, threads=threads, rounds=rounds)
    _row(bundle, "native", threads, native(bundle, asked, scratch / "pixels"))
    with jobs.serve({"bundle": bundle, "job": scratch}, isolated=threads > 1) as address:
        page = browser.open(f"{address}/index.html")
        found = page.evaluate(f"driverRun({json.dumps(asked.job)})", timeout=600)
    assert found["picture"] == asked.picture, "the page's tokens differ from the native ones"
    _row(bundle, "WASM", threads, found["times"])


def _row(bundle: Path, place: str, threads: int, times: dict[str, list[float]]) -> None:
    fastest = " | ".join(f"{min(times[stage]):.1f}" for stage in STAGES)
    sys.stdout.write(f"| {bundle.name} | {place} | {threads} | {fastest} |\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
