"""vlmedge bench on the command line: one real run of two small models, its reports, comparisons, and refusals."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import one_line
from tests.test_report_page import read
from vlmedge.bundle import open_bundle
from vlmedge.cli import main
from vlmedge.device_bench.report.load import read_records

SCENARIO = """
title = "One small picture"
tokens = 4
warmup = 0
repeat = 2
rounds = 1

[[ask]]
name = "small"
picture = "small.png"
question = "What?"
"""


@dataclass(frozen=True)
class Bench:
    """A run: its folder, what the command was, and the JSON object that it printed."""

    folder: Path
    command: tuple[object, ...]
    data: dict


@pytest.fixture(scope="module")
def ran(bundle, photo, tmp_path_factory) -> Bench:
    """The golden bundle under two names, one of them with a causal prefix: what is measured is real."""
    folder = tmp_path_factory.mktemp("bench")
    right, wrong = folder / "right.gguf", folder / "wrong.gguf"
    shutil.copytree(bundle, right)
    shutil.copytree(bundle, wrong)
    manifest = json.loads((wrong / "vlmedge.json").read_text())
    manifest["model"]["decoder"]["bidirectional_prefix"] = False
    (wrong / "vlmedge.json").write_text(json.dumps(manifest))
    shutil.copy(photo, folder / "small.png")
    (folder / "one.toml").write_text(SCENARIO)
    options = ("--unit", "cpu", "--threads", 1, "--scenario", folder / "one.toml", "--out", folder / "out", "--json")
    command = ("bench", right, wrong, *options)
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as stop:
        main([str(word) for word in command])
    assert not stop.value.code
    assert out.getvalue().count("\n") == 1
    return Bench(folder, command, json.loads(out.getvalue()))


def test_json_says_what_was_measured(ran):
    assert ran.data["folder"] == str(ran.folder / "out")
    assert ran.data["schema"] == "vlmedge.bench-summary/1"
    assert [row["variant"]["label"] for row in ran.data["rows"]] == ["right.gguf", "wrong.gguf"]
    for row in ran.data["rows"]:
        assert row["statuses"] == {"ok": 1}
        assert row["stages"]["end_to_end"]["n"] == 2
        assert row["counts"]["small"]["generated"] == 4
        assert row["memory"]["peak"]["median"] > row["memory"]["baseline"]["median"] > 0
        assert 0 < row["reached"]["decode"] < 1.5
        assert row["threads"] == 1


def test_the_folder_has_records_and_three_reports(ran):
    out = ran.folder / "out"
    assert sorted(path.name for path in out.iterdir()) == ["records.jsonl", "report.csv", "report.html", "report.md"]
    records = read_records(out)
    assert [r.kind for r in records if r.reply.status == "ok"] == ["anchor", "measure", "measure", "anchor"]
    rows = list(csv.DictReader(io.StringIO((out / "report.csv").read_text(encoding="utf-8"))))
    for record in records:
        if record.reply.samples:
            middle = sum(s.ms["end_to_end"] for s in record.reply.samples) / 2  # the median of two
            (found,) = (
                r for r in rows
                if (r["label"], r["ask"], r["stage"]) == (record.variant.label, "*", "end_to_end")
            )  # fmt: skip
            assert float(found["median"]) == pytest.approx(middle)
    page = "\n".join(read((out / "report.html").read_text(encoding="utf-8")).text)
    for text in (page, (out / "report.md").read_text(encoding="utf-8")):
        assert "right.gguf" in text
        assert "Nothing was compared with an original" in text


def test_the_same_command_measures_nothing_again_and_prints_a_table(ran, succeed):
    before = (ran.folder / "out/records.jsonl").read_bytes()
    done = succeed(*ran.command[:-1])
    assert (ran.folder / "out/records.jsonl").read_bytes() == before
    assert done.err == ""
    assert all(words in done.out for words in ("right.gguf", "wrong.gguf", "first token", "tokens/s", "Fastest"))
    assert done.out.endswith(f"report: {ran.folder / 'out/report.html'}\n")


def test_a_narrow_terminal_gets_a_table_that_fits(ran, succeed, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    monkeypatch.setenv("COLUMNS", "80")
    out = re.sub("\x1b\\[[0-9;]*m", "", succeed(*ran.command[:-1], "--quiet").out)
    (row,) = (line for line in out.splitlines() if "right.gguf" in line and "  " in line.strip())
    assert len(row) <= 80
    assert len(row.split()) == 6  # in one line: label, top-1, first token, rate, answer, memory
    assert "first token" in out


def test_reports_are_written_again(ran, succeed, refused, tmp_path):
    shutil.copy(ran.folder / "out/records.jsonl", tmp_path)
    assert succeed("bench", "report", tmp_path / "records.jsonl").out == f"report: {tmp_path / 'report.html'}\n"
    written = (tmp_path / "report.html").read_bytes()
    assert written == (ran.folder / "out/report.html").read_bytes()
    (tmp_path / "report.html").unlink()
    (tmp_path / "report.html").mkdir()
    assert "report.html cannot be written" in refused("bench", "report", tmp_path)


def test_compare_ends_with_1_where_something_is_worse_for_sure(ran, cli, succeed, tmp_path):
    before = ran.folder / "out"
    assert "no regression\n" in succeed("bench", "compare", before, before).out
    lines = [json.loads(line) for line in (before / "records.jsonl").read_text().splitlines()]
    for record in lines:
        if record["variant"] and record["variant"]["label"] == "right.gguf":
            record["variant"]["bytes"] *= 2
    after = tmp_path / "after.jsonl"
    after.write_text("".join(json.dumps(record) + "\n" for record in lines))
    done = cli("bench", "compare", before, after, "--json", "--report", tmp_path / "beside.md")
    assert done.code == 1
    assert "**Regressions**" in (tmp_path / "beside.md").read_text(encoding="utf-8")
    assert one_line(done.err).startswith("vlmedge: 1 regression; the first: right.gguf (local): size ")
    assert len(done.data["regressions"]) == 1
    assert succeed("bench", "compare", after, before).out.endswith("no regression\n")


def test_records_that_cannot_be_read_are_named(ran, refused, tmp_path):
    text = (ran.folder / "out/records.jsonl").read_text()
    for content, words in (
        ("", "holds no records"),
        (text[:300], "holds no records"),
        (text.replace("vlmedge.bench/1", "vlmedge.bench/9"), "line 1 has the schema 'vlmedge.bench/9'"),
        (f"{text}[\n", "is damaged: it is not JSON"),
    ):
        (tmp_path / "records.jsonl").write_text(content)
        assert words in refused("bench", "compare", ran.folder / "out", tmp_path, code=2)
        assert words in refused("bench", "report", tmp_path, code=2)
    assert "there is no run's file" in refused("bench", "report", tmp_path / "none", code=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["records.jsonl"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "toaster"], "unknown device 'toaster'"),
        (["--device", "local", "--device", "local"], "the device 'local' is named twice"),
        (["--scenario", "shaps"], "did you mean 'shapes'?"),
        (["--tokens", "1"], "1 is not in the range"),
        (["--rounds", "0"], "0 is not in the range"),
        (["--sustained", "0"], "is not in the range"),
        (["--tune", "thread"], "did you mean 'threads'?"),
        (["--tune", "threads", "--threads", "1"], "either given or tuned"),
        (["--memory", "huge"], "unknown word 'huge'"),
        (["--sernario", "quick"], "No such option '--sernario'"),
    ],
)
def test_usage_is_checked_before_anything_is_measured(bundle, refused, tmp_path, options, words):
    assert words in refused("bench", bundle, *options, "--out", tmp_path / "out", code=2)
    assert not (tmp_path / "out").exists()


def test_sources_are_checked_before_anything_is_measured(bundle, bundle_copy, refused, tmp_path):
    out = ("--out", tmp_path / "out")
    assert "(vlmedge bench --help)" in refused("bench", code=2)
    assert "there is no folder" in refused("bench", tmp_path / "none.gguf", *out, code=2)
    assert "a model is measured once" in refused("bench", bundle, bundle_copy, *out, code=2)
    assert "is a bundle; the original is a checkpoint" in refused("bench", "--original", bundle, bundle, *out, code=2)
    file = max(open_bundle(bundle_copy).path.glob("*.gguf"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-10])
    assert f"{file.name} has " in refused("bench", bundle_copy, *out)
    assert not (tmp_path / "out").exists()


def test_another_runs_folder_is_not_touched(ran, bundle, refused, tmp_path):
    before = (ran.folder / "out/records.jsonl").read_bytes()
    assert "holds another run" in refused("bench", bundle, "--unit", "cpu", "--out", ran.folder / "out")
    assert (ran.folder / "out/records.jsonl").read_bytes() == before
    (tmp_path / "file").touch()
    assert "cannot be written" in refused("bench", bundle, "--unit", "cpu", "--out", tmp_path / "file")


def test_a_unit_that_is_not_there_is_no_success(bundle, cli, tmp_path):
    done = cli("bench", bundle, "--unit", "metal", "--out", tmp_path / "out")
    if done.code == 0:  # on a Mac
        return
    assert done.code == 1
    assert one_line(done.err).startswith("vlmedge: nothing could be measured: ")
    assert "Nothing was measured" in done.out
    (record,) = read_records(tmp_path / "out")
    assert (record.reply.status, record.variant.unit) == ("unavailable", "metal")


@pytest.mark.parametrize("text", ["junk", "5", "nan", "-1%", "100%"])
def test_the_tolerance_is_a_share(ran, refused, text):
    out = ran.folder / "out"
    assert "--tolerance takes a share" in refused("bench", "compare", out, out, "--tolerance", text, code=2)


def test_devices_and_scenarios_are_listed(succeed):
    known = succeed("bench", "devices", "--json").data
    shown = succeed("bench", "devices").out
    assert {"local", "raspberry-pi-5-8gb"} <= known["devices"].keys()
    assert {"standard", "quick", "sizes", "shapes", "caption"} <= known["scenarios"].keys()
    assert all(name in shown for name in (*known["devices"], *known["scenarios"]))


def test_help_names_what_else_there_is(succeed):
    for words in (("bench", "--help"), ("bench", "x.gguf", "--help")):
        shown = succeed(*words).out
        assert "Usage: vlmedge bench SOURCE... [OPTIONS]" in shown
        assert all(word in shown for word in ("--original", "--sustained", "compare ", "report ", "devices "))
