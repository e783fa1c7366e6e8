"""What the benchmark's harness costs on decode: its own time per token beside a bare loop over the same session.

In one process and one opened model, taking turns: the harness answers a question as `vlmedge bench` does (skills, stop
rules, text, stopwatch); the skills answer it alone, as `vlmedge run` does; the bare loop feeds as many tokens behind
the same prefix and takes the largest logit.

    python benchmarks/bench_overhead.py BUNDLE...
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import time
from pathlib import Path

import numpy as np
from real_size import machine

import vlmedge
import vlmedge.device_bench
from vlmedge.device_bench.job import Ask, Work
from vlmedge.device_bench.measuring import Subject
from vlmedge.session import Session
from vlmedge.skills import Model

QUESTION = "What is it?"
PICTURE = Path(vlmedge.device_bench.__file__).parent / "images/square-378x378.jpg"


def bare(session: Session, start: int, tokens: int) -> list[float]:
    """Milliseconds of each token after `start` positions."""
    session.rewind(start)
    token, out = np.array([7], np.int32), []
    for _ in range(tokens):
        before = time.perf_counter()
        token[0] = session.forward(token).logits.argmax()
        out.append((time.perf_counter() - before) * 1000)
    return out


def skills(subject: Subject, tokens: int) -> float:
    """Milliseconds of each token after the first, in mean, of an answer without a stopwatch."""
    plain = Model(subject.fresh().spec, subject.model.session, subject.model.tokenizer)
    ms = plain.query(PICTURE, QUESTION, max_tokens=tokens + 1).timings_ms
    return (ms["total"] - ms["first_token"]) / tokens


def compare(bundle: str, tokens: int, rounds: int, threads: int | None) -> str:
    """One line for one bundle: medians over all tokens of all rounds, and of the rounds' ratios."""
    asked = Ask("a", str(PICTURE), hashlib.sha256(PICTURE.read_bytes()).hexdigest(), 378, 378, QUESTION)
    work = Work("overhead", (asked,), tokens + 1, warmup=1, repeat=1)
    ours: list[float] = []
    theirs: list[float] = []
    ratios, products = [], []
    with vlmedge.load(bundle, threads=threads) as model:
        subject = Subject(model)
        subject.warm_up(work)
        for _ in range(rounds):
            sample = subject.measure(work).samples[0]
            harness = list(sample.token_ms)
            loop = bare(model.session, model.session.position - 1, tokens)  # next_first_token left the prompt there
            ratios.append(statistics.median(harness) / statistics.median(loop))
            whole = (sample.ms["end_to_end"] - sample.ms["first_token"]) / tokens
            products.append(whole / skills(subject, tokens))
            ours += harness
            theirs += loop
    a, b = statistics.median(ours), statistics.median(theirs)
    each = f"{min(ratios):.3f} to {max(ratios):.3f}"
    return (
        f"{Path(bundle).name:24} harness {a:8.3f} ms  bare {b:8.3f} ms  ratio {a / b:.3f}  of rounds {each}  "
        f"over the skills alone {statistics.median(products):.3f}"
    )


def main() -> None:
    """Read the command line and print a line per bundle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    print(machine()["cpu"])
    for bundle in args.bundles:
        print(compare(bundle, args.tokens, args.rounds, args.threads), flush=True)


if __name__ == "__main__":
    main()
