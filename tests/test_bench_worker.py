"""The benchmark's worker: a job in, timed samples, memory and agreement out, in a process of its own."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from tests.hub_server import HubServer, Repo
from vlmedge.bundle import open_bundle
from vlmedge.device_bench import agreement, worker
from vlmedge.device_bench.job import Ask, Job, Variant, Work
from vlmedge.device_bench.page_cache import cached, drop, fill
from vlmedge.device_bench.result import Reply
from vlmedge.errors import RuntimeFailedError
from vlmedge.loading import load
from vlmedge.prompt import Tokenizer
from vlmedge.records import decode, encode
from vlmedge.subject import examine

IMAGES = Path(__file__).parent / "data/moondream2/images"
SUMMED = ("image", "preprocess", "vision", "project", "tokenize", "prefill", "prompt")
TOKENS = 6


def ask(picture: str, question: str) -> Ask:
    path = IMAGES / picture
    return Ask(picture, str(path), hashlib.sha256(path.read_bytes()).hexdigest(), 0, 0, question)


WORK = Work("test", (ask("small.png", "What is it?"), ask("big.png", "")), TOKENS, warmup=1, repeat=2)
BRIEF = replace(WORK, asks=WORK.asks[:1], repeat=1)


def variant(source: Path | str, runtime: str, **others: object) -> Variant:
    found = examine(str(source), Path(source).name)
    given = {"threads": 1} | others
    return Variant(
        found.label, str(source), found.digest, found.format, found.profile, found.bytes, None, runtime, **given
    )


@pytest.fixture(scope="module")
def truth(golden, tmp_path_factory) -> Path:
    """What the golden checkpoint answers, as a run keeps it."""
    reply = worker.work(Job("reference", "local", WORK, variant=variant(golden, "torch", dtype="f32")))
    assert reply.status == "ok", reply.reason
    path = tmp_path_factory.mktemp("truth") / "truth.json"
    path.write_text(json.dumps(reply.environment["truth"]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def reply(bundle, truth) -> Reply:
    """The bundle's job, done by a fresh process as hosts start it."""
    job = Job("measure", "local", WORK, variant=variant(bundle, "llamacpp"), truth=str(truth), cold=True)
    return fresh(job)


def fresh(job: Job) -> Reply:
    command = [sys.executable, "-m", "vlmedge.device_bench.worker"]
    done = subprocess.run(command, input=json.dumps(encode(job)), capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1
    return decode(Reply, json.loads(done.stdout), "the reply")


def test_every_sample_has_every_stage(reply):
    assert reply.status == "ok", reply.reason
    assert [sample.ask for sample in reply.samples] == ["small.png", "big.png"] * WORK.repeat
    for sample in reply.samples:
        assert {*SUMMED, "first_token", "decode", "detokenize", "end_to_end", "next_first_token"} == set(sample.ms)
        assert len(sample.token_ms) == TOKENS - 1
        parts = sum(sample.ms[stage] for stage in SUMMED)
        # What lies between: choosing the token and making text of it.
        assert parts <= sample.ms["first_token"] < 1.5 * parts + 5
        assert sample.ms["first_token"] + sum(sample.token_ms) <= sample.ms["end_to_end"] * 1.01
        assert sample.ms["decode"] == pytest.approx(np.mean(sample.token_ms), abs=1e-3)
        assert sample.ms["next_first_token"] < sample.ms["first_token"]


def test_counts_load_and_memory(reply, bundle):
    spec = open_bundle(bundle).manifest.model
    small, big = reply.counts
    assert (small.crops, small.encoded_crops, small.image_tokens) == (2, 1, spec.image_tokens)
    assert big.encoded_crops == big.crops > 2
    assert small.generated == big.generated == TOKENS
    assert reply.load is not None
    assert reply.load.files == ("cold" if drop([*bundle.glob("*.gguf")]) else "")
    assert reply.load.ms > 0 < reply.load.import_ms
    memory = reply.memory
    assert memory is not None
    assert 0 < memory.baseline <= memory.loaded <= memory.peak
    assert memory.above_baseline == memory.peak - memory.baseline
    assert reply.threads == 1 == reply.environment["session"]["threads"]
    assert reply.costs is not None
    assert reply.costs.flops_per_crop > 0 < reply.costs.weight_bytes_per_token


def test_a_lossless_bundle_agrees(reply):
    found = reply.agreement
    assert found is not None
    assert (found.top1, found.same_answers) == (1.0, 1.0)
    assert found.kl < 1e-5
    assert 2 <= found.tokens <= 2 * TOKENS  # as far as the original goes on by itself
    assert [one.first_divergent for one in found.asks] == [None, None]


def test_a_wrong_bundle_disagrees_in_the_same_reply(bundle, truth, tmp_path):
    """A decoder that looks at the picture causally is as fast, and wrong."""
    wrong = Path(shutil.copytree(bundle, tmp_path / "causal.gguf"))
    manifest = json.loads((wrong / "vlmedge.json").read_text(encoding="utf-8"))
    manifest["model"]["decoder"]["bidirectional_prefix"] = False
    (wrong / "vlmedge.json").write_text(json.dumps(manifest), encoding="utf-8")
    job = Job("measure", "local", BRIEF, variant=variant(wrong, "llamacpp"), truth=str(truth))
    reply = worker.work(job)
    assert reply.status == "ok", reply.reason
    assert reply.samples[0].ms["first_token"] > 0
    assert reply.agreement is not None
    assert reply.agreement.kl > 1e-3


def test_the_original_in_its_own_dtype(golden, truth):
    job = Job("measure", "local", BRIEF, variant=variant(golden, "torch", dtype="bf16"), truth=str(truth))
    reply = worker.work(job)
    assert reply.status == "ok", reply.reason
    assert reply.agreement is not None
    assert 0 < reply.agreement.kl < 0.1
    assert reply.environment["session"]["dtype"] == "bfloat16"


def test_an_anchor_measures_the_machine():
    reply = worker.work(Job("anchor", "local", WORK, threads=1))
    assert reply.ceiling is not None
    assert reply.ceiling.threads == 1
    assert reply.ceiling.bandwidth > 0.1
    assert {"f32", "int8"} <= set(reply.ceiling.gemm)


@pytest.mark.parametrize(
    ("changes", "work", "status", "reason"),
    [
        ({"unit": "cuda"}, {}, "unavailable", "computes on the CPU only; build it anew"),
        ({"unit": "abacus"}, {}, "failed", "has no unit 'abacus'"),
        ({"runtime": "coral"}, {}, "unavailable", "has no runtime 'coral'"),
        ({"affinity": (4000,)}, {}, "unavailable", "the processors 4000 are not here; it has 0"),
        ({"source": "/nowhere"}, {}, "failed", "/nowhere"),
        ({}, {"tokens": 100_000}, "failed", "100000 tokens do not fit"),
    ],
)
def test_what_cannot_be_done_is_a_reply(bundle, changes, work, status, reason):
    asked = replace(BRIEF, warmup=0, **work)
    reply = worker.work(Job("measure", "local", asked, variant=replace(variant(bundle, "llamacpp"), **changes)))
    assert reply.status == status
    assert reason in reply.reason
    assert "\n" not in reply.reason


def test_min_seconds_and_minutes_go_on(golden):
    with load(golden, threads=1) as model:
        subject = worker.Subject(model)
        for longer in (replace(BRIEF, min_seconds=0.3), replace(BRIEF, minutes=0.3 / 60)):
            start = time.perf_counter()
            sustained = subject.measure(longer)
            assert time.perf_counter() - start >= 0.3
            assert len(sustained.samples) > 1
        assert all(sample.token_ms == () for sample in sustained.samples)
        assert sustained.samples[-1].at > sustained.samples[0].at


def test_a_model_of_the_hub_is_fetched_before_it_is_opened(golden, tmp_path, monkeypatch):
    """Asking the hub again and again would stand in every load."""
    files = {path.name: path.read_bytes() for path in golden.iterdir() if path.is_file()}
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    named = replace(variant(golden, "torch", dtype="f32"), source="owner/tiny")
    before = []

    def opened(*args, **options):
        before.append(len(hub.requests))
        return load(*args, **options)

    monkeypatch.setattr(worker, "load", opened)
    with HubServer({"owner/tiny": Repo({"a" * 40: files}, {"main": "a" * 40})}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        reply = worker.work(Job("measure", "local", BRIEF, variant=named, cold=True))
        assert reply.status == "ok", reply.reason
        assert before == [len(hub.requests)] != [0]


def test_files_out_of_the_page_cache_and_in_it(tmp_path):
    files = [tmp_path / "weights", tmp_path / "empty"]
    files[0].write_bytes(b"\1" * (1 << 22))
    files[1].touch()
    assert fill(files)
    assert cached(files) in (1.0, None)  # not every system tells
    out = drop(iter(files))
    assert cached(files) in ((0.0, None) if out else (1.0, None))  # a disk in memory keeps all
    assert fill(files)
    assert not fill([*files, tmp_path / "none"])
    assert not drop([*files, tmp_path / "none"])


def test_logits_that_are_no_numbers_are_told():
    with pytest.raises(RuntimeFailedError, match="its logits are NaN or infinite"):
        agreement.truth_of("a", (0,), np.array([[1.0, np.nan]], np.float32))
    with pytest.raises(RuntimeFailedError, match="its logits are NaN or infinite"):
        agreement.truth_of("a", (0,), np.array([[1.0, np.inf]], np.float32))


def test_following_ones_own_answer_chooses_it_again(golden):
    with load(golden, threads=1) as model:
        answer = model.query(IMAGES / "small.png", "What is it?", max_tokens=TOKENS)
        logits = model.follow(IMAGES / "small.png", "What is it?", answer.tokens)
        assert logits.argmax(axis=1).tolist() == list(answer.tokens)
        assert np.isneginf(logits[1:, list(model.spec.prompt.banned)]).all()


def test_divergence_of_distributions():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((3, 500), dtype=np.float32) * 3
    truth = agreement.truth_of("a", logits.argmax(axis=1).tolist(), logits)
    assert agreement.followed(truth, logits).best == truth.tokens
    other = logits + rng.standard_normal(logits.shape, dtype=np.float32)
    whole = [exact(p, q) for p, q in zip(logits, other, strict=True)]
    along = agreement.followed(truth, other)
    kept = [agreement._divergence(p, q) for p, q in zip(truth.logprobs, along.logprobs, strict=True)]
    for lower, true in zip(kept, whole, strict=True):
        assert 0.5 * true < lower <= true + 1e-6
    same = agreement.followed(truth, logits)
    assert agreement._divergence(truth.logprobs[0], same.logprobs[0]) < 1e-6


def test_what_is_forced_behind_a_stop_token_does_not_count():
    stop, rng = 3, np.random.default_rng(1)
    logits = rng.standard_normal((4, 50), dtype=np.float32)
    tokens = [7, stop, 8, 9]
    logits[range(4), tokens] = 9
    truth = agreement.Truth("m", (agreement.truth_of("a", tokens, logits),))
    other = logits.copy()
    other[2:] = rng.standard_normal((2, 50))
    words = Tokenizer(Path(__file__).with_name("data").joinpath("moondream2/tiny-mha/tokenizer.json").read_bytes())
    along = {"a": agreement.followed(truth.of("a"), other)}
    found = agreement.agreement(truth, {"a": [7, stop, 1, 1]}, along, words, [stop])
    assert (found.tokens, found.top1, found.same_answers, found.asks[0].first_divergent) == (2, 1.0, 1.0, None)
    assert found.kl < 1e-6


def exact(p: np.ndarray, q: np.ndarray) -> float:
    log_p, log_q = (x.astype(np.float64) - np.log(np.exp(x.astype(np.float64)).sum()) for x in (p, q))
    return float((np.exp(log_p) * (log_p - log_q)).sum())
