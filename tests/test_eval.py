"""vlmedge eval on real models: scores, kills, shards, and what is refused."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

import vlmedge
from vlmedge.answer import Answer, Box, Point
from vlmedge.demo import demo_answers, demo_folder, demo_picture
from vlmedge.demo.evaluate import evaluate as demo_evaluate
from vlmedge.demo.evaluate import unseen
from vlmedge.errors import ContextError, OutputError, UnsupportedError, UsageError
from vlmedge.evaluation.asking import ask
from vlmedge.evaluation.dataset import open_dataset
from vlmedge.evaluation.evaluate import Settings, evaluate
from vlmedge.evaluation.job import Shard, answer, todo
from vlmedge.evaluation.question import Picture, Question
from vlmedge.progress import Progress
from vlmedge.subject import fingerprint

SOURCE = "demo:moondream2"
ONE = Settings(threads=1)
N = 12  # pictures


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The demo checkpoint as ONNX w8a8."""
    out = tmp_path_factory.mktemp("eval") / "w8a8.onnx"
    return vlmedge.export(SOURCE, "onnx", "w8a8", out, verify=False, threads=1).path


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """An undisturbed run beside the original."""
    return evaluate([small], original=SOURCE, pictures=N, out=tmp_path_factory.mktemp("whole") / "out", settings=ONE)


def lines(folder):
    """Every journal line but the first of each file, by file."""
    return {p.name: [json.loads(x) for x in p.read_text().splitlines()[1:]] for p in sorted(folder.glob("*.jsonl"))}


def timeless(evaluation):
    """All that has nothing to do with time or place."""
    data = evaluation.as_dict()
    for score in data["scores"]:
        del score["ms"], score["seconds"]
    del data["folder"]
    return data


def test_scores_are_those_of_the_demo(small, whole):
    with vlmedge.load(small, threads=1) as model:
        wanted = demo_evaluate(model, unseen(N))
    original, score = whole.scores
    assert whole.complete
    assert original.original
    assert not score.original
    values = {name: found.value for name, found in score.metrics.items()}
    assert values["exact"] == pytest.approx(wanted.exact)
    assert values["mean_iou"] == pytest.approx(wanted.mean_iou)
    assert values["box_hits"] == pytest.approx(wanted.hit_rate("detect"))
    assert values["point_hits"] == pytest.approx(wanted.hit_rate("point"))
    assert {kind: found.value for kind, found in score.kinds.items()} == pytest.approx(wanted.kinds)
    assert values["exact"] > 0.9
    assert score.subject.bytes < original.subject.bytes


def test_a_model_beside_the_original(whole):
    (pair,) = whole.pairs
    assert (pair.base, pair.questions) == (SOURCE, whole.questions)
    found = pair.differences["right"]
    base, ours = (score.metrics["right"].value for score in whole.scores)
    assert found.value == pytest.approx(ours - base)
    assert found.value * whole.questions == pytest.approx(pair.won - pair.lost)
    assert 0.5 < pair.same < 1  # int8 moves boxes a little


def test_an_interrupted_run_goes_on(small, whole, tmp_path):
    """Ctrl-C in the first model, a kill in the second, a line cut short: nothing is lost and nothing asked twice."""
    out = tmp_path / "out"
    stopped = _stopped_at(40, signal.SIGINT, out, small)
    assert stopped.returncode == 130
    assert (
        stopped.stderr == "vlmedge: interrupted; the answers so far are kept, and the same command goes on from there\n"
    )
    first = lines(out)
    assert 40 <= sum(map(len, first.values())) < whole.questions
    assert _stopped_at(whole.questions + 20, signal.SIGKILL, out, small).returncode == -signal.SIGKILL
    second = lines(out)
    assert whole.questions + 20 <= sum(map(len, second.values())) < 2 * whole.questions
    with next(out.glob("w8a8*.jsonl")).open("ab") as file:
        file.write(b'{"id": "5/1", "pict')  # what a kill in the middle of a write leaves
    again = evaluate([small], original=SOURCE, pictures=N, out=out, settings=ONE)
    assert timeless(again) == timeless(whole)
    for name, rows in lines(out).items():
        ids = [row["id"] for row in rows]
        assert len(ids) == len(set(ids)) == whole.questions
        for before in (first, second):
            kept = before.get(name, [])
            assert rows[: len(kept)] == kept  # as they were, times and all


def _stopped_at(count, how, out, bundle):
    """Run the command and send it a signal as soon as so many answers are written."""
    command = ["eval", bundle, "--original", SOURCE, "--pictures", N, "--out", out, "--threads", 1]
    process = subprocess.Popen(
        [sys.executable, "-m", "vlmedge", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and _written(out) < count:
        time.sleep(0.002)
    process.send_signal(how)
    shown, told = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, shown, told)


def _written(folder):
    """Whole lines of answers."""
    return sum(path.read_bytes().count(b"\n") - 1 for path in folder.glob("*.jsonl") if path.stat().st_size)


def test_shards_put_together_are_a_whole_run(small, whole, tmp_path):
    for index in (0, 1):
        told = Told()
        options = {"pictures": N, "shard": (index, 2), "out": tmp_path, "settings": ONE}
        part = evaluate([small], original=SOURCE, progress=told, **options)
        assert told.done == told.total == sum(len(p.questions) for p in open_dataset("demo", N).pictures[index::2]) * 2
        assert part.complete == (index == 1)  # the second finds what the first left
    asked = sum(map(len, lines(tmp_path).values()))
    merged = evaluate([small], original=SOURCE, pictures=N, out=tmp_path, settings=ONE)
    assert timeless(merged) == timeless(whole)
    assert sum(map(len, lines(tmp_path).values())) == asked == 2 * whole.questions


class Told(Progress):
    """Remembers what the last stage was told."""

    def stage(self, text, total=None):
        self.total, self.done = total, 0

    def advance(self, steps):
        self.done += steps


def test_a_split_shard_is_the_same_pictures():
    dataset = open_dataset("demo", 20)
    shard = Shard("m", "m", "demo", 20, "", dataset.digest, index=1, count=3)
    mine = [picture.name for picture, _ in todo(dataset, shard, ())]
    parts = [[picture.name for picture, _ in todo(dataset, part, ())] for part in shard.split(2)]
    assert sorted(name for part in parts for name in part) == sorted(mine)
    assert len(mine) == 7


def test_more_pictures_and_more_models_are_added(small, tmp_path):
    evaluate([small], pictures=1, out=tmp_path, settings=ONE)
    before = lines(tmp_path)
    more = evaluate([small], original=SOURCE, pictures=2, out=tmp_path, settings=ONE)
    assert more.complete
    assert [score.answered for score in more.scores] == [more.questions] * 2
    for name, rows in before.items():
        assert lines(tmp_path)[name][: len(rows)] == rows


def test_answers_of_something_else_are_refused(small, tmp_path):
    evaluate([small], pictures=1, out=tmp_path, settings=ONE)
    with pytest.raises(OutputError, match="made with max_tokens by default, not 3"):
        evaluate([small], pictures=1, out=tmp_path, settings=replace(ONE, max_tokens=3))
    (journal,) = tmp_path.glob("*.jsonl")
    text = journal.read_text()
    head, *rest = text.splitlines()
    for key, told in (("model", "another model"), ("data", "another question set")):
        journal.write_text("\n".join([json.dumps(json.loads(head) | {key: "0"}), *rest]) + "\n")
        with pytest.raises(OutputError, match=told):
            evaluate([small], pictures=1, out=tmp_path, settings=ONE)
    journal.write_text("\n".join([head, rest[0][:20], *rest[1:]]) + "\n")
    with pytest.raises(OutputError, match="line 2 is damaged"):
        evaluate([small], pictures=1, out=tmp_path, settings=ONE)
    journal.write_text("\n".join([head, rest[0], rest[0]]) + "\n")
    with pytest.raises(OutputError, match="line 3 answers '0/0' again"):
        evaluate([small], pictures=1, out=tmp_path, settings=ONE)
    journal.write_text(text)
    evaluate([small], pictures=1, out=tmp_path, settings=ONE)
    assert journal.read_text() == text


def test_two_writers_are_refused(small, tmp_path):
    evaluate([small], pictures=1, out=tmp_path, settings=ONE)
    (journal,) = tmp_path.glob("*.jsonl")
    with journal.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another evaluation is writing"):
            evaluate([small], pictures=1, out=tmp_path, settings=ONE)


def test_a_users_file_about_real_pictures(small, tmp_path):
    """The shipped pictures with their answers as a JSONL file; a reading question with ten people's answers."""
    entries = []
    for known in demo_answers():
        for task in known["tasks"]:
            key = "question" if task["skill"] == "query" else "object"
            entry = {k: task[k] for k in ("skill", "kind", "answers", "boxes", "points") if k in task}
            entry |= {"length" if task["skill"] == "caption" else key: task["text"]}
            entries.append(entry | {"image": str(demo_picture(known["picture"]))})
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(map(json.dumps, entries)))
    found = evaluate([small], path, out=tmp_path / "out", settings=ONE)
    assert (found.pictures, found.questions) == (len(demo_answers()), len(entries))
    values = {name: estimate.value for name, estimate in found.scores[0].metrics.items()}
    with vlmedge.load(small, threads=1) as model:
        right = [
            model.query(e["image"], e["question"]).text.strip() in e["answers"] for e in entries if "question" in e
        ]
    rows = [row for part in lines(tmp_path / "out").values() for row in part if row["skill"] == "query"]
    assert sum(row["exact"] for row in rows) == sum(right)
    assert values["box_hits"] > 0.9
    assert values["point_hits"] > 0.8  # within 5 % of the longer side of the centre
    assert values["exact"] <= values["anls"]


def test_files_of_test_data_and_a_bundle_without_an_original(bundle, photo, tmp_path, succeed):
    """A random model: what it says is known from asking it, so the scores are known."""
    with vlmedge.load(bundle, threads=1) as model:
        said = model.query(photo, "What is it?", max_tokens=4).text
    asked = {"image": os.path.relpath(photo, tmp_path), "question": "What is it?"}
    entries = [asked | {"answers": [said, "other"]}, asked | {"answers": ["nothing like it"]}]
    entries.append(asked | {"answers": [said] * 2 + ["no"] * 8, "kind": "people"})
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(map(json.dumps, entries)))
    options = ("--threads", 1, "--max-tokens", 4, "--out", tmp_path / "out")
    data = succeed("eval", bundle, "--data", path, *options, "--json").data
    (score,) = data["scores"]
    assert data["schema"] == "vlmedge.evaluation/1"
    assert score["metrics"]["exact"]["value"] == pytest.approx(2 / 3)
    assert score["metrics"]["soft"]["value"] == pytest.approx((1 + 0 + 0.6) / 3)
    assert {kind: found["value"] for kind, found in score["kinds"].items()} == {"people": 1.0, "query": 0.5}
    assert data["pairs"] == []
    table = succeed("eval", bundle, "--data", path, *options).out
    assert "3 questions about 1 picture" in table
    assert "66.7 %" in table


def test_the_command(small, whole, tmp_path, succeed, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = succeed("eval", small, "--original", SOURCE, "--pictures", 2, "--threads", 1, "--shard", "0/2")
    assert "(original)" in shown.out
    assert "without --shard" in shown.out
    (folder,) = tmp_path.glob("eval-*")
    shown = succeed("eval", small, "--original", SOURCE, "--pictures", 2, "--threads", 1)
    assert "compared with demo:moondream2" in shown.out
    assert "without --shard" not in shown.out
    assert len(list(folder.glob("*.jsonl"))) == 4
    assert "--shard takes I/N" in refused("eval", small, "--shard", "2/2", code=2)
    assert "is the same model as another" in refused("eval", small, small, code=2)
    assert "the original is a checkpoint" in refused("eval", SOURCE, "--original", small, code=2)
    assert "there is no question file" in refused("eval", small, "--data", "none.jsonl", code=2)


def test_a_damaged_bundle_is_refused_before_it_is_asked(small, tmp_path, refused):
    copy = tmp_path / "copy.onnx"
    shutil.copytree(small, copy)
    largest = max(copy.iterdir(), key=lambda file: file.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    assert "is damaged" in refused("eval", copy, "--pictures", 1, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_shard_is_only_answered_by_what_it_names(small):
    digest, data = fingerprint(str(small)), open_dataset("demo", 1).digest
    shard = Shard(str(small), "m", "demo", 1, digest, data, threads=1)
    rows = []
    answer(shard, frozenset(("0/0",)), rows.append)
    assert [row.id for row in rows] == [f"0/{n}" for n in range(1, len(rows) + 1)]
    with pytest.raises(UsageError, match="not the model that was asked for"):
        answer(replace(shard, model_digest="0"), (), rows.append)
    with pytest.raises(UsageError, match="not the question set"):
        answer(replace(shard, data_digest="0"), (), rows.append)


def test_a_changed_picture_is_another_question_set(small, photo, tmp_path):
    picture, path = tmp_path / "photo.png", tmp_path / "set.jsonl"
    shutil.copy(photo, picture)
    path.write_text(json.dumps({"image": picture.name, "question": "What is it?", "answers": ["a cat"]}))
    options = {"out": tmp_path / "out", "settings": ONE}
    evaluate([small], path, **options)
    shard = Shard(str(small), "m", str(path), None, fingerprint(str(small)), open_dataset(str(path)).digest, threads=1)
    with picture.open("ab") as file:
        file.write(b" ")
    with pytest.raises(OutputError, match="another question set"):
        evaluate([small], path, **options)
    with pytest.raises(UsageError, match="the file or a picture has changed"):
        answer(shard, (), [].append)
    shutil.copy(photo, picture)
    evaluate([small], path, **options)


def test_a_fingerprint_holds_every_file_that_decides_an_answer(tmp_path):
    folder = shutil.copytree(demo_folder("moondream2"), tmp_path / "copy")
    found = [fingerprint(SOURCE)]
    assert fingerprint(str(folder)) == found[0]  # wherever it lies
    (folder / "README.md").write_text("Nothing that is read.")
    assert fingerprint(str(folder)) == found[0]
    with (folder / "tokenizer.json").open("a") as file:
        file.write("\n")
    found.append(fingerprint(str(folder)))
    for name in ("generation_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
        found.append(fingerprint(str(folder)))
    with (folder / "config.json").open("a") as file:
        file.write("\n")
    found.append(fingerprint(str(folder)))
    assert len(set(found)) == len(found)


class Unable:
    """A model that cannot find and cannot read much."""

    def query(self, image, question, **options):
        raise ContextError("too long")

    def detect(self, image, thing):
        raise UnsupportedError("no region heads")

    def point(self, image, thing):
        return Answer("point", points=(Point(0.5, 0.5), Point(0.1, 0.1)))


def test_what_a_model_cannot_do():
    image = np.zeros((100, 200, 3), np.uint8)
    picture = Picture("p", lambda: image, ())
    read = ask(Unable(), image, picture, Question("1", "query", "query", "?", ("",)))
    assert (read.right, read.exact, read.soft, read.anls, read.problem) == (False, 0.0, 0.0, 0.0, "too long")
    found = ask(Unable(), image, picture, Question("2", "detect", "detect", "cat"))
    assert (found.right, found.exact, found.problem) == (None, None, "no region heads")
    box = Question("3", "point", "point", "cat", boxes=(Box(0.4, 0.4, 0.6, 0.6),), points=(Point(0.9, 0.9),))
    row = ask(Unable(), image, picture, box)
    assert (row.right, row.things, row.hits) == (False, 1, 1)  # the box decides; one point too many
    near = Question("4", "point", "point", "cat", points=(Point(0.54, 0.5), Point(0.1, 0.18)))
    row = ask(Unable(), image, picture, near)
    assert (row.right, row.things, row.hits) == (True, 2, 2)  # 8 pixels each, 10 are near
