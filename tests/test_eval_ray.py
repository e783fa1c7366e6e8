"""An evaluation on a Ray cluster gives what it gives here, also when a machine dies in the middle of it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from threading import Thread

import pytest

from vlmedge import __version__
from vlmedge.errors import RuntimeFailedError, UsageError
from vlmedge.evaluation import cluster
from vlmedge.evaluation.dataset import DEMO, open_dataset
from vlmedge.evaluation.evaluate import evaluate
from vlmedge.evaluation.job import Shard, Task, opened, run_here
from vlmedge.pipeline import export
from vlmedge.progress import Progress
from vlmedge.subject import fingerprint

PICTURES = 12
STORE = 80 * 2**20  # bytes of shared memory a node


class Counted(Progress):
    """Counts what it is told."""

    def __init__(self):
        self.rows = 0

    def advance(self, steps):
        self.rows += steps


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """12 pictures for a bundle of the trained demo."""
    out = tmp_path_factory.mktemp("ray") / "demo.onnx"
    source = str(export("demo:moondream2", "onnx", "w8a8", out, verify=False, threads=1).path)
    digest = open_dataset(DEMO, PICTURES).digest
    return Shard(source, source, DEMO, PICTURES, fingerprint(source), digest, runtime="onnxruntime", threads=1)


@pytest.fixture(scope="module")
def here(shard):
    """The rows that this process gets."""
    rows = {}
    run_here([Task(shard, frozenset(), lambda row: rows.setdefault(row.id, row))], Progress())
    return rows


@pytest.fixture
def machines():
    """A head without CPUs and two machines with one each."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            made.add_node(num_cpus=1, object_store_memory=STORE)
        yield made
    finally:
        made.shutdown()


def refused(error, work, *arguments, **options):
    with pytest.raises(error) as caught:
        work(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def nobody(row):
    raise AssertionError(row)


def freeze_task(node) -> int:
    """Wait until a machine is in the middle of one of our tasks, and stop its process there; its number."""
    raylet = str(node.all_processes["raylet"][0].process.pid)
    while True:
        listed = subprocess.run(
            ["ps", "--ppid", raylet, "-o", "pid=,args="], capture_output=True, text=True, check=False
        )
        for line in listed.stdout.splitlines():
            number, _, name = line.strip().partition(" ")
            if name.startswith("ray::evaluate"):
                os.kill(int(number), signal.SIGSTOP)
                return int(number)
        time.sleep(0.02)


@pytest.mark.slow
def test_a_machine_that_dies_costs_nothing(machines, shard, here, monkeypatch):
    monkeypatch.setattr(cluster, "QUESTIONS", 1)  # a part for every picture
    doomed = next(iter(machines.worker_nodes))
    frozen, got, progress = [], [], Counted()
    watch = Thread(target=lambda: frozen.append(freeze_task(doomed)), daemon=True)
    watch.start()

    def emit(row):
        if len(got) == 20:
            watch.join(60)
            try:
                machines.remove_node(doomed, allow_graceful=False)
            finally:
                os.kill(frozen[0], signal.SIGKILL)
        got.append(row)

    cluster.run([Task(shard, frozenset(), emit)], progress, address=machines.address)
    assert Counter(row.id for row in got) == Counter(here.keys())
    assert {row.id: replace(row, ms=0.0) for row in got} == {i: replace(row, ms=0.0) for i, row in here.items()}
    assert progress.rows == len(here)


@pytest.mark.slow
def test_answers_are_kept_and_refusals_are_one_line(machines, shard, here, tmp_path, monkeypatch, capfd):
    def run(tasks, progress):
        cluster.run(tasks, progress, address=machines.address)

    def ask(progress=None):
        return evaluate([shard.source], pictures=PICTURES, out=tmp_path / "eval", runner=run, progress=progress)

    assert ask().complete
    (journal,) = (tmp_path / "eval").iterdir()
    lines = journal.read_text().splitlines()
    assert Counter(json.loads(line)["id"] for line in lines[1:]) == Counter(here.keys())
    journal.write_text("\n".join(lines[:-5]) + "\n")
    progress = Counted()
    assert ask(progress).complete
    assert progress.rows == 5

    task = Task(shard, frozenset(), nobody)
    where = f"on the node {socket.gethostname()}: {shard.source} is not the model"
    assert refused(UsageError, run, [replace(task, shard=replace(shard, model_digest="0"))], Progress()).startswith(
        where
    )
    greedy = [replace(task, shard=replace(shard, threads=2))]
    assert refused(UsageError, run, greedy, Progress()).endswith("the largest has 1")
    import ray

    ray.init(machines.address, log_to_driver=False, logging_level="CRITICAL")  # a connection of the caller's stays
    monkeypatch.setattr(cluster, "__version__", "9.9")
    assert f"has vlmedge {__version__}, this machine 9.9" in refused(RuntimeFailedError, run, [task], Progress())
    assert ray.is_initialized()
    ray.shutdown()
    assert capfd.readouterr().out == ""


def test_parts_are_the_whole(shard):
    asked = [q.id for picture in open_dataset(DEMO, PICTURES).pictures for q in picture.questions]
    done = frozenset(asked[:20])
    for slots, count in ((1, 5), (8, 8), (100, 11)):  # by 32 questions, by CPUs, by pictures that are left
        parts = cluster.split(Task(shard, done, nobody), 1, slots)
        assert len(parts) == count
        assert Counter(i for part in parts for i in part.left) == Counter(asked[20:])
        assert {i for part in parts for i in part.done} <= done
    assert cluster.split(Task(shard, frozenset(asked), nobody), 1, 8) == []


def test_files_that_a_node_lacks(shard, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / DEMO).mkdir()  # the question set of that name is no folder
    lost = replace(shard, source=str(tmp_path / "lost"))
    reply = json.loads(cluster.answer_part(json.dumps(asdict(lost)), []))
    assert reply["error"] == "UsageError"
    assert f"there is no {lost.source}; put it in a folder that all nodes share" in reply["text"]
    moved = replace(shard, source=os.path.relpath(shard.source))
    assert {part.shard.source for part in cluster.split(Task(moved, frozenset(), nobody), 1, 2)} == {shard.source}


def test_a_node_keeps_the_model_between_parts(shard, here, monkeypatch):
    """Until one fails, or is asked to run otherwise."""
    told = []
    monkeypatch.setattr(cluster, "opened", lambda *given: told.append(given) or opened(*given))
    rows = []
    parts = cluster.split(Task(shard, frozenset(), nobody), 1, 3)
    for part in parts:
        rows += json.loads(cluster.answer_part(json.dumps(asdict(part.shard)), part.done))["rows"]
    assert len(parts) > 2
    assert len(told) == 1
    assert [row["text"] for row in rows] == [here[row["id"]].text for row in rows]
    assert Counter(row["id"] for row in rows) == Counter(here.keys())
    cluster.answer_part(json.dumps(asdict(replace(shard, dtype="bf16", pictures=1))), [])
    assert len(told) == 2
    assert len(cluster._KEPT) == 1
    reply = json.loads(cluster.answer_part(json.dumps(asdict(replace(shard, model_digest="0"))), []))
    assert "is not the model that was asked for" in reply["text"]
    assert not cluster._KEPT
    with pytest.raises(ZeroDivisionError), cluster._kept(shard, Progress()):
        raise ZeroDivisionError
    assert not cluster._KEPT


def test_a_node_with_another_picture(shard, photo, tmp_path):
    shutil.copy(photo, tmp_path / "photo.png")
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps({"image": "photo.png", "question": "What is it?", "answers": ["a cat"]}))
    asked = replace(shard, data=str(path), pictures=None, data_digest=open_dataset(str(path)).digest)
    with (tmp_path / "photo.png").open("ab") as file:
        file.write(b" ")
    reply = json.loads(cluster.answer_part(json.dumps(asdict(asked)), []))
    assert reply["error"] == "UsageError"
    assert reply["text"].endswith("is not the question set that was asked for; the file or a picture has changed")


def test_a_node_without_vlmedge(monkeypatch):
    errand = cluster._errand()
    monkeypatch.setitem(sys.modules, "vlmedge", None)
    reply = json.loads(errand("1.0", "", []))
    assert reply["text"].endswith("has vlmedge none, this machine 1.0: pip install vlmedge==1.0 there")


@pytest.mark.parametrize("address", ["", "nonsense", "host:", "host:70000", "http://host:80", "local"])
def test_addresses_that_are_none(address, shard):
    text = refused(UsageError, cluster.run, [Task(shard, frozenset(), nobody)], Progress(), address=address)
    assert text == f"--ray takes HOST:PORT, ray://HOST:PORT or auto, not '{address}'"


def test_addresses_where_nobody_answers(shard):
    with socket.socket() as taken:  # bound, but not listening
        taken.bind(("127.0.0.1", 0))
        for address in (f"127.0.0.1:{taken.getsockname()[1]}", "nowhere.invalid:6379"):
            text = refused(
                RuntimeFailedError, cluster.run, [Task(shard, frozenset(), nobody)], Progress(), address=address
            )
            assert text.startswith(f"no Ray cluster answers at {address}: ")
