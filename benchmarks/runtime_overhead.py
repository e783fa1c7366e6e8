"""What our session costs on top of llama.cpp: decode and prefill through `LlamaCppSession` beside a bare loop.

Both run on the same weights in memory, interleaved in one process, so that neither noise nor memory placement favours
one. Each round measures a prefill of one picture's prefix and `--tokens` decoded tokens for both, in alternating
order. The last line of the output is one JSON object. The model has random weights; by default it is moondream2's
decoder at its real size as Q4_K_M (800 MB, made in a minute and kept in `--work`).

    python benchmarks/runtime_overhead.py
    python benchmarks/runtime_overhead.py --layers 2 --width 256 --tokens 16 --rounds 3   # a smoke test
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from real_size import Size, random_tensors

from vlmedge.runtimes.cores import physical_cores
from vlmedge.runtimes.llamacpp_native import load_native
from vlmedge.runtimes.llamacpp_session import LlamaCppSession
from vlmedge.session import F32, I32
from vlmedge.spec import ModelSpec


@dataclass
class Samples:
    """Seconds of one way: per prefill, and per decoded token of each round."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


@dataclass
class BareLoop:
    """The shortest loop over libllama: its own context on the session's weights, the best token read in place.

    llama.cpp's own greedy sampler is not used: it copies the vocabulary into a list of candidates first.
    """

    llama: Any
    model: Any
    context: Any
    memory: Any
    vocab: int

    def prefill(self, rows: F32) -> None:
        """One bidirectional batch of embeddings, on an empty cache."""
        self.llama.llama_memory_seq_rm(self.memory, 0, 0, -1)
        batch = self.llama.llama_batch()
        batch.n_tokens = len(rows)
        batch.embd = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        self.llama.llama_set_causal_attn(self.context, False)
        assert self.llama.llama_decode(self.context, batch) == 0
        self.llama.llama_set_causal_attn(self.context, True)

    def decode(self, tokens: int) -> None:
        """Decode greedily."""
        one = (self.llama.llama_token * 1)(7)
        batch = self.llama.llama_batch_get_one(one, 1)
        for _ in range(tokens):
            assert self.llama.llama_decode(self.context, batch) == 0
            logits = self.llama.llama_get_logits_ith(self.context, -1)
            one[0] = int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())


def bare_loop(session: LlamaCppSession, spec: ModelSpec, threads: int) -> BareLoop:
    """A bare loop on the weights that `session` has loaded."""
    native = load_native()
    llama, model = native.llama, session._decoder.model
    params = native.fill(
        llama.llama_context_default_params(),
        n_ctx=spec.decoder.context,
        n_batch=session._decoder._batch_size,
        n_ubatch=session._decoder._batch_size,
        n_threads=threads,
        n_threads_batch=threads,
        flash_attn_type=0,
        no_perf=True,
    )
    context = llama.llama_init_from_model(model, params)
    return BareLoop(llama, model, context, llama.llama_get_memory(context), spec.decoder.vocab)


def ours_prefill(session: LlamaCppSession, rows: F32, hidden: bool) -> None:
    """The picture's prefix through the session."""
    session.rewind(0)
    session.forward(rows, bidirectional=True, hidden=hidden)


def ours_decode(session: LlamaCppSession, tokens: int, hidden: bool) -> None:
    """Decode greedily through the session."""
    token: I32 = np.array([7], np.int32)
    for _ in range(tokens):
        token[0] = session.forward(token, hidden=hidden).logits.argmax()


def timed(run: Callable[[], None]) -> float:
    """Seconds that `run` takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(session: LlamaCppSession, bare: BareLoop, rows: F32, args: argparse.Namespace) -> dict[str, Samples]:
    """Alternate the ways for `args.rounds` rounds; a first round warms up and is thrown away."""
    ways: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "bare": (lambda: bare.prefill(rows), lambda: bare.decode(args.tokens)),
        "ours": (
            lambda: ours_prefill(session, rows, args.hidden),
            lambda: ours_decode(session, args.tokens, args.hidden),
        ),
    }
    samples = {name: Samples() for name in ways}
    for round_ in range(args.rounds + 1):
        for name in list(ways)[:: 1 if round_ % 2 else -1]:
            prefill, decode = timed(ways[name][0]), timed(ways[name][1]) / args.tokens
            if round_:
                samples[name].prefill.append(prefill)
                samples[name].decode.append(decode)
    return samples


def random_model(args: argparse.Namespace) -> tuple[ModelSpec, Path]:
    """The spec and the folder of GGUF files with random weights, written where they are not there yet."""
    spec = Size(args.layers, args.width, vision_layers=1, vision_width=64).spec()
    folder = args.work / f"{args.layers}x{args.width}-{args.profile}.gguf"
    return spec, random_tensors(spec).exported("gguf", args.profile, folder, physical_cores())


def report(samples: dict[str, Samples], args: argparse.Namespace, session: LlamaCppSession) -> dict[str, Any]:
    """Medians and ratios (bare time over ours: 1 is no overhead), with all samples."""
    record: dict[str, Any] = {"benchmark": "runtime_overhead", "model": vars(args) | {"work": str(args.work)}}
    for stage in ("prefill", "decode"):
        bare, ours = (getattr(samples[name], stage) for name in ("bare", "ours"))
        middle = {"bare_ms": statistics.median(bare) * 1e3, "ours_ms": statistics.median(ours) * 1e3}
        ratio = middle["bare_ms"] / middle["ours_ms"]
        record[stage] = middle | {"ratio": ratio, "bare_s": bare, "ours_s": ours}
        print(f"{stage:8} bare {middle['bare_ms']:9.3f} ms   ours {middle['ours_ms']:9.3f} ms   ratio {ratio:.4f}")
    return record | {"info": session.info()}


def main() -> None:
    """Make the model, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--profile", default="q4")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--hidden", action="store_true", help="ask for the hidden state at every step, as detect does")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--work", type=Path, default=Path("/tmp/vlmedge-runtime-overhead"))
    args = parser.parse_args()
    spec, folder = random_model(args)
    session = LlamaCppSession(spec, folder, threads=args.threads)
    rows = np.random.default_rng(0).standard_normal((spec.image_tokens + 1, args.width), dtype=np.float32)
    record = report(measure(session, bare_loop(session, spec, args.threads), rows, args), args, session)
    session.close()
    print(json.dumps(record))


if __name__ == "__main__":
    main()
