"""The browser as a host: a real page in headless Chromium, pages that fail, and what stands in its way."""

from __future__ import annotations

import http.client
import json
import os
import socket
import struct
import threading
import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from tests.browser import chromium
from tests.web import jobs
from vlmedge.bundle import open_bundle
from vlmedge.demo import attention
from vlmedge.device_bench import agreement
from vlmedge.device_bench.agreement import Truth
from vlmedge.device_bench.device import Device, load_device, open_host
from vlmedge.device_bench.hosts.browser import BrowserHost
from vlmedge.device_bench.hosts.chromium import find_browser
from vlmedge.device_bench.hosts.onnxruntime_web import onnxruntime_web
from vlmedge.device_bench.hosts.page_outcome import outcome, refused
from vlmedge.device_bench.hosts.process_tree import Tree
from vlmedge.device_bench.hosts.served import Served, Task
from vlmedge.device_bench.job import Ask, Job, Variant, Work
from vlmedge.device_bench.measuring import Subject
from vlmedge.errors import RuntimeFailedError, UsageError
from vlmedge.loading import load
from vlmedge.pipeline import export
from vlmedge.records import encode

PICTURES = Path(attention.__file__).parent / "pictures"
DIST = jobs.MODULES / "onnxruntime-web/dist"
ASKS = tuple(
    Ask(name, str(PICTURES / f"{name}.png"), "", 0, 0, question)
    for name, question in (("wide", "How many shapes do you see?"), ("shapes", ""))
)
WORK = Work("test", ASKS, tokens=10, warmup=1, repeat=2)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "w8a8.onnx"
    return export("demo:moondream2", "onnx", "w8a8", out, verify=False, threads=1).path


def host(**options: str) -> BrowserHost:
    jobs.install()
    found = BrowserHost(Device("here", "this browser", "browser", options={"onnxruntime_web": str(DIST)} | options))
    found.open()
    return found


def variant(bundle: Path, unit: str = "wasm", threads: int | None = 1) -> Variant:
    size = open_bundle(bundle).bytes
    return Variant("w8a8", str(bundle), "d", "onnx", "w8a8", size, 8.0, "onnxruntime", unit, threads=threads)


def job(bundle: Path, work: Work = WORK, **what: object) -> Job:
    return Job("measure", "here", work, variant=variant(bundle, **what))


@pytest.fixture(scope="module")
def native(bundle, tmp_path_factory):
    """The native run of the same asks, and its answers as a truth."""
    with load(bundle, threads=1) as model:
        subject = Subject(model)
        asked = subject.measure(replace(WORK, repeat=1))
        rows = {a.name: subject.fresh().follow(a.picture, a.question or None, asked.tokens[a.name]) for a in ASKS}
    found = tuple(agreement.truth_of(name, asked.tokens[name], logits) for name, logits in rows.items())
    path = tmp_path_factory.mktemp("truth") / "truth.json"
    path.write_text(json.dumps(encode(Truth("native", found))))
    return asked, str(path)


def test_a_page_is_measured_and_answers_as_the_native_run(bundle, native):
    asked, truth = native
    found = host()
    try:
        units = found.units()["onnxruntime"]
        assert units["wasm"] == ""
        assert "GPU" in units["webgpu"] or "processor" in units["webgpu"]
        reply = found.run(replace(job(bundle, threads=2), truth=truth), 60)
        late = found.run(job(bundle, replace(WORK, tokens=100)), 0.3)
    finally:
        found.close()
    assert found.name.startswith("browser chrom")
    assert (reply.status, reply.reason, reply.threads) == ("ok", "", 2)
    assert reply.counts == tuple(asked.counts.values())
    assert reply.agreement.top1 == reply.agreement.same_answers == 1.0
    assert [a.first_divergent for a in reply.agreement.asks] == [None, None]
    assert reply.agreement.kl < 1e-3
    assert [s.ask for s in reply.samples] == ["wide", "shapes"] * 2
    for sample in reply.samples:
        stages = ("vision", "project", "prefill", "prompt")
        assert sample.ms.keys() == {*stages, "first_token", "decode", "end_to_end", "next_first_token"}
        assert sum(sample.ms[stage] for stage in stages) <= sample.ms["first_token"] < sample.ms["end_to_end"]
        assert len(sample.token_ms) == 9
        assert sample.ms["decode"] == pytest.approx(np.mean(sample.token_ms), abs=1e-3)
    assert reply.environment["cross_origin_isolated"]
    assert reply.environment["timer_us"] < 50
    assert reply.environment["first_token"] == "crops in hand to first token"
    assert 10 < reply.memory.baseline < reply.memory.loaded <= reply.memory.peak
    assert late.status == "hung"


@pytest.mark.slow
def test_webgpu_is_never_webassembly_instead(bundle):
    found = host(software="yes")
    try:
        assert found.units()["onnxruntime"] == {"wasm": "", "webgpu": ""}
        reply = found.run(job(bundle, unit="webgpu"), 60)
    finally:
        found.close()
    assert reply.status == "unavailable"
    assert "GroupQueryAttention (WebGPU): causal=0 is not implemented; export" in reply.reason


@pytest.mark.slow
def test_a_person_opens_the_page(bundle, tmp_path):
    """Two tasks one after the other in one window, the second with a damaged model; then the window is closed."""
    told: list[str] = []
    jobs.install()
    options = {"onnxruntime_web": str(DIST), "url": "wait"}
    found = open_host(Device("phone", "a phone", "browser", options=options), told.append)
    found.open()
    damaged = tmp_path / "damaged.onnx"
    for file in open_bundle(bundle).path.rglob("*"):
        if file.is_file():
            (damaged / file.relative_to(bundle)).parent.mkdir(parents=True, exist_ok=True)
            (damaged / file.relative_to(bundle)).write_bytes(file.read_bytes())
    graph = damaged / "onnx/vision_encoder.onnx"
    graph.write_bytes(b"\xff" * graph.stat().st_size)
    try:
        with chromium() as browser:
            page = browser.open(told[0].split()[1])
            assert found.units()["onnxruntime"]["wasm"] == ""
            one = found.run(job(bundle, replace(WORK, repeat=1)), 60)
            other = found.run(job(damaged), 60)
            assert page.evaluate("document.title") == "vlmedge bench"
    finally:
        found.close()
    assert (one.status, other.status) == ("ok", "failed")
    assert found.name == "browser"
    assert one.memory.peak is None
    assert "protobuf" in other.reason.lower()


# ---- pages without a browser: they speak HTTP only ------------------------------------------------------------


class FakePage:
    """Asks as the page does."""

    def __init__(self, address: str) -> None:
        self.url = urlsplit(address)

    def ask(self, path: str, body: str | None = None, home: str | None = None) -> tuple[int, bytes]:
        wire = http.client.HTTPConnection(self.url.hostname, self.url.port, timeout=10)
        wire.request("POST" if body is not None else "GET", (home or self.url.path) + path, body)
        answer = wire.getresponse()
        content = answer.read()
        wire.close()
        return answer.status, content

    def take(self) -> str:
        status, content = self.ask("job")
        assert status == 200
        return f"task/{json.loads(content)['number']}"

    def vanish(self, home: str, *, reset: bool) -> None:
        """Hold the line that tells that the page lives, and cut it."""
        wire = http.client.HTTPConnection(self.url.hostname, self.url.port, timeout=10)
        wire.request("GET", f"{self.url.path}{home}/alive")
        answer = wire.getresponse()
        assert answer.status == 200
        if reset:  # as where the browser's process is killed
            answer.fp.raw._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        answer.close()
        wire.close()


@pytest.fixture
def served(tmp_path):
    (tmp_path / "ort.wasm.min.mjs").write_text("export {}")
    found = Served(tmp_path)
    yield found
    found.close()


def told(served: Served, act, data: dict | None = None, files: dict | None = None):
    """What comes of a task when a page does `act(page, home of the task)`."""
    task, page = Task(data or {}, files or {}), FakePage(served.address)
    served.give(task)
    thread = threading.Thread(target=lambda: act(page, page.take()))
    thread.start()
    found = outcome(task, None, 5)
    thread.join()
    served.withdraw()
    return found


@pytest.mark.parametrize(
    ("sent", "status", "reason"),
    [
        ("{", "rubbish", "not JSON"),
        ('{"status": "fine"}', "rubbish", "'fine'"),
        ('{"status": "ok"}', "rubbish", "empty"),
        ('{"status": "failed", "reason": "Error: 404"}', "failed", "Error: 404"),
        ('{"status": "failed", "reason": "RangeError: Array buffer allocation failed"}', "out_of_memory", "buffer"),
        ('{"status": "failed", "reason": "RuntimeError: Aborted(OOM)"}', "out_of_memory", "OOM"),
        ('{"status": "unavailable", "reason": "no GPU"}', "unavailable", "no GPU"),
    ],
)
def test_what_a_page_says(served, sent, status, reason):
    found = told(served, lambda page, home: page.ask(f"{home}/reply", sent))
    reply = found if type(found).__name__ == "Reply" else refused(found)
    assert reply.status == status
    assert reason in reply.reason


@pytest.mark.parametrize("reset", [False, True])
def test_a_page_that_is_closed_is_noticed(served, reset):
    start = time.monotonic()
    reply = told(served, lambda page, home: page.vanish(home, reset=reset))
    assert reply.status == "lost"
    assert time.monotonic() - start < 4


def test_nobody_comes_or_nothing_is_done(served):
    task = Task({})
    assert outcome(task, None, 5, visit=0.1).reason.startswith("nobody opened the page")
    served.give(task)
    FakePage(served.address).take()
    assert outcome(task, None, 0.1).status == "hung"


def test_the_server_gives_what_is_listed_and_to_those_who_know_its_address(served, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")

    def look(page: FakePage, home: str) -> None:
        seen.update(
            inside=page.ask(f"{home}/bundle/a"),
            page=page.ask("")[0],
            library=page.ask("ort/ort.wasm.min.mjs")[0],
            unknown=[
                page.ask(path)[0]
                for path in (f"{home}/bundle/b", "task/7/bundle/a", "../secret.txt", "ort/secret.txt", f"{home}/")
            ],
            outside=page.ask("job", home="/")[0],
            large=page.ask(f"{home}/reply", "x" * 10, home="/")[0],
        )
        page.ask(f"{home}/reply", "{}")

    seen: dict = {}
    told(served, look, files={"bundle/a": b"weights"})
    assert seen == {
        "inside": (200, b"weights"),
        "page": 200,
        "library": 200,
        "unknown": [404] * 5,
        "outside": 404,
        "large": 404,
    }
    assert served.address.startswith("http://127.0.0.1:")


# ---- what stands in the way -----------------------------------------------------------------------------------


def test_a_person_is_told_what_to_open(tmp_path):
    for name in ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.wasm"):
        (tmp_path / name).touch()
    said: list[str] = []
    device = load_device("browser")
    found = open_host(replace(device, options=device.options | {"onnxruntime_web": str(tmp_path)}), said.append)
    found.open()
    found.close()
    assert [line.startswith("open http://127.0.0.1:") for line in said] == [True]


def test_a_browser_that_does_not_start(tmp_path, bundle):
    program = tmp_path / "broken"
    program.write_text('#!/bin/sh\n[ "$1" = --version ] || echo "no display" >&2\nexit 3\n')
    program.chmod(0o755)
    found = host(program=str(program))
    try:
        reply = found.run(job(bundle), 20)
        with pytest.raises(RuntimeFailedError, match="does not tell its units: the browser ended with the code 3"):
            found.units()
    finally:
        found.close()
    assert (reply.status, reply.reason) == ("crashed", "the browser ended with the code 3: no display")


def test_what_a_browser_cannot_do(bundle):
    found = host(program="true")
    try:
        anchor = found.run(Job("anchor", "here", WORK), 1)
        gguf = found.run(Job("measure", "here", WORK, variant=replace(variant(bundle), format="gguf")), 1)
        long = found.run(job(bundle, replace(WORK, tokens=5000)), 1)
        gone = found.run(Job("measure", "here", WORK, variant=replace(variant(bundle), source="/nowhere")), 1)
    finally:
        found.close()
    assert [r.status for r in (anchor, gguf, long, gone)] == ["unavailable", "unavailable", "unavailable", "failed"]
    assert "5000 tokens do not fit behind" in long.reason
    assert "no such folder" in gone.reason


def test_what_is_missing_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeFailedError, match="no Chromium, Chrome or Edge is on PATH; install one"):
        find_browser()
    with pytest.raises(RuntimeFailedError, match="there is no program firefox; correct"):
        find_browser("firefox")
    with pytest.raises(RuntimeFailedError, match=r"npm, which would fetch it, is not installed; install Node\.js"):
        onnxruntime_web(cache=tmp_path)
    with pytest.raises(RuntimeFailedError, match=r"lacks ort\.wasm\.min\.mjs; onnxruntime_web is the 'dist' folder"):
        onnxruntime_web(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"listen": "1.2.3.4:x"}, "write ADDRESS"),
        ({"listen": "203.0.113.9"}, "cannot be served at"),
        ({"tab": ""}, "'tab'"),
    ],
)
def test_options(options, text):
    with pytest.raises(UsageError, match=text):
        host(program="true", **options)


def test_a_tree_of_processes():
    """Of this process's children there are none, of its parent's there is this one, at least."""
    assert Tree(os.getpid()).processes() == []
    above = Tree(os.getppid())
    assert os.getpid() in above.processes()
    usage = above.usage()
    assert 10 < usage.resident <= usage.peak
    assert above.cpu_seconds() > 0
