"""The benchmark's report: what counts, how sure it is, and a page that shows speed and agreement side by side."""

from __future__ import annotations

import csv
import io
import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from tests.bench_records import ASKS, ENVIRONMENT, KINDS, WORK, anchor, measured, minutes, record, run
from tests.browser import chromium
from tests.test_report_page import CONTRAST, CROSSING, HOSTILE, LETTERS, LONG, SCHEMES, read
from vlmedge.device_bench.report import csv_text, markdown, page, tables, told
from vlmedge.device_bench.report.chosen import is_calm, last_tries
from vlmedge.device_bench.report.load import read_records, schema_text
from vlmedge.device_bench.report.statistics import Samples, figures, ratio
from vlmedge.device_bench.report.summary import summarise
from vlmedge.device_bench.result import Energy, Reply
from vlmedge.errors import UsageError
from vlmedge.records import encode

SCHEMA_FILE = Path(__file__).parent.parent / "device_bench/bench.schema.json"
CODE = "from vlmedge.device_bench.report.load import schema_text; print(schema_text(), end='')"
FULL = [*run(), *minutes()]


def hostile():
    """Every text is one that wants out."""
    name = HOSTILE.replace("\x00", "")
    work = replace(WORK, scenario=name, asks=tuple(replace(a, name=f"{a.name}{name}", question=name) for a in ASKS))
    for found in FULL:
        samples = tuple(replace(s, ask=f"{s.ask}{name}") for s in found.reply.samples)
        counts = tuple(replace(c, ask=f"{c.ask}{name}") for c in found.reply.counts)
        answer = replace(found.reply, reason=name, samples=samples, counts=counts, environment={name: {name: [name]}})
        variant = found.variant and replace(found.variant, label=f"{name}{found.variant.label}")
        yield replace(found, run=name, device=name, host=LONG, variant=variant, work=work, reply=answer)


def elsewhere():
    """Three devices with names that never end, a GPU, energy, nothing to compare with."""
    for i, device in enumerate(("phone", LONG, "board")):
        for found in run(KINDS[2:5], 2, i, again=False):
            answer = found.reply
            if answer.memory:
                memory = replace(answer.memory, gpu_peak=2100.0, baseline=None, mapped=None)
                energy = Energy(510.0, 31.4, 20.0, "RAPL package 0")
                answer = replace(answer, memory=memory, energy=energy, agreement=None, costs=None, others=None)
            variant = found.variant and replace(found.variant, label=f"{found.variant.label} {LONG}" * (1 + i))
            yield replace(found, device=device, reply=answer, variant=variant, ceiling=None, reached={}, drift=None)


PAGES = {
    "full": FULL,
    "hostile": list(hostile()),
    "elsewhere": list(elsewhere()),
    "begun": run()[:1],
    "failed": [r for r in FULL if r.reply.status != "ok"],
    "load": list(minutes(count=3)),
    "single": run(KINDS[3:5], 1, again=False),
}


@pytest.fixture(scope="module")
def summaries():
    return {name: summarise(records) for name, records in PAGES.items()}


@pytest.fixture(scope="module")
def full(summaries):
    return summaries["full"]


@pytest.fixture(scope="module")
def rendered(summaries):
    return {name: page.render(summaries[name], records) for name, records in PAGES.items()}


# The file.
def written(folder, records):
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(encode(r)) + "\n" for r in records), encoding="utf-8")
    return path


def test_the_shipped_schema_is_fresh():
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text(), f'stale; run: python -c "{CODE}" > {SCHEMA_FILE}'


def test_records_come_back_and_fit_the_schema(tmp_path):
    path = written(tmp_path, FULL)
    assert read_records(path) == read_records(tmp_path) == FULL
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))
    for found in (FULL[0], FULL[1], FULL[2], FULL[-1]):
        validator.validate(json.loads(json.dumps(encode(found))))
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({**json.loads(json.dumps(encode(FULL[2]))), "schema": "vlmedge.bench/0"})


def test_a_cut_last_line_is_left_out(tmp_path):
    path = written(tmp_path, FULL[:5])
    path.write_bytes(path.read_bytes()[:-40])
    assert read_records(path) == FULL[:4]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no records"),
        ('{"cut', "holds no records"),
        ("{broken}\n", "line 1 is damaged: it is not JSON"),
        ("\xff\n", "line 1 is damaged"),
        ("[1]\n", "line 1 has no schema, this version reads vlmedge.bench/1"),
        ('{"schema": "vlmedge.bench/9"}\n', "line 1 has the schema 'vlmedge.bench/9', this version reads"),
        ('\n{"schema": "vlmedge.bench/1", "run": 5}\n', "line 2: the record.run must be a string"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(tmp_path, text, words):
    path = tmp_path / "records.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=re.escape(words)) as caught:
        read_records(path)
    assert "\n" not in str(caught.value)


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(UsageError, match="there is no run's file"):
        read_records(tmp_path)
    data = encode(FULL[0]) | {"started": "yesterday"}
    (tmp_path / "records.jsonl").write_text(json.dumps(data) + "\n")
    with pytest.raises(UsageError, match="line 1 has started at 'yesterday'"):
        read_records(tmp_path)


# Statistics.
def test_figures_of_one_ask():
    found = figures([[[1.0, 2.0, 3.0], [4.0, 10.0]]])
    assert (found.n, found.rounds, found.median, found.mean, found.least, found.most) == (5, 2, 3.0, 4.0, 1.0, 10.0)
    assert (found.p90, found.p95, found.p99) == pytest.approx((7.6, 8.8, 9.76))  # type 7
    assert found.stdev == pytest.approx(math.sqrt(12.5))
    assert found.low <= 3.0 <= found.high
    assert found == figures([[[1.0, 2.0, 3.0], [4.0, 10.0]]])


def test_asks_have_one_voice_each():
    """Three questions of unlike cost: the mean of their medians, not the middle one's."""
    found = figures([[[1.0, 1.0], [1.0]], [[10.0, 10.0], []], [[100.0], [100.0]]])
    assert (found.median, found.low, found.high) == (37.0, 37.0, 37.0)
    assert figures([[], [[]], [[7.0]]]).median == 7.0
    assert figures([[[]], []]) is figures([]) is None


def test_one_sample_tells_no_interval():
    assert (figures([[[5.0]]]).low, figures([[[5.0]]]).stdev) == (None, 0.0)
    assert ratio([[[6.0]]], [[[3.0, 3.1]]]) == replace(ratio([[[6.0]]], [[[3.05]]]), low=None, high=None)
    assert ratio([[[6.0]]], [[[]]]) is None
    assert ratio([[[6.0]]], [[[0.0]]]) is None
    alone = figures([[[float(i) for i in range(20)]]])
    assert alone.rounds == 1
    assert alone.low < 9.5 < alone.high


def processes(rng, count, samples=9, middle=100.0) -> Samples:
    """Processes that differ by 3 %, samples within them by 1 %."""
    return [
        [
            [process + rng.gauss(0, 1) for _ in range(samples)]
            for process in (middle + rng.gauss(0, 3) for _ in range(count))
        ]
    ]


@pytest.mark.parametrize("count", [3, 5, 10])
def test_intervals_hold_the_truth(count):
    """Drawn samples alone would hold it in about a third of the cases: they know nothing of other processes."""
    rng = random.Random(count)
    found = [figures(processes(rng, count)) for _ in range(100)]
    held = sum(f.low <= 100 <= f.high for f in found)
    assert held >= (75 if count == 3 else 88)  # three values have the truth outside of all of them in 1 of 4 cases
    ratios = [ratio(processes(rng, count, middle=150), processes(rng, count)) for _ in range(50)]
    assert sum(r.low <= 1.5 <= r.high for r in ratios) >= 45
    assert sum(r.low > 1 for r in ratios) >= 45


def test_thousands_of_samples_keep_their_median():
    rng = random.Random(0)
    values = [[rng.lognormvariate(0, 0.3) for _ in range(3000)] for _ in range(2)]
    found = figures([values])
    assert found.n == 6000
    assert found.low <= found.median <= found.high
    assert found.high - found.low < 0.2


# What counts.
def test_the_second_try_replaces_the_first(full):
    (again,) = (r for r in FULL if r.again)
    found = next(r for r in full.rows if r.label == again.variant.label)
    assert (found.rounds, found.left_out) == (3, 0)
    assert any("run again" in note for note in full.notes)


def test_a_job_on_another_device_is_another_job(summaries):
    assert len(summaries["elsewhere"].rows) == 9
    assert {row.rounds for row in summaries["elsewhere"].rows} == {2}


def test_a_process_before_an_anchor_that_drifted_is_not_calm():
    rng = random.Random(0)
    jobs = [measured(rng, KINDS[0], 1, 60), measured(rng, KINDS[0], 2, 120)]
    steady, slowed = replace(anchor(100), drift=0.0), replace(anchor(180), drift=0.2)
    found = last_tries([jobs[0], steady, jobs[1], slowed])
    assert [record.drift for record in found] == [0.01, 0.0, 0.2, 0.2]
    assert [is_calm(record) for record in found if record.kind == "measure"] == [True, False]


def test_only_calm_processes_count_where_there_are_any():
    rng, kind = random.Random(3), KINDS[4]
    calm = [measured(rng, kind, i, 100 * i) for i in (1, 2)]
    hot = measured(rng, kind, 3, 300, 3.0, drift=0.4)
    busy = measured(rng, kind, 4, 400, 3.0)
    busy = replace(busy, reply=replace(busy.reply, others=0.7))
    (found,) = summarise([*calm, hot, busy]).rows
    assert (found.rounds, found.left_out) == (2, 2)
    assert found.stages["decode"].median == pytest.approx(61, rel=0.08)
    summary = summarise([hot, busy])
    (found,) = summary.rows
    assert (found.rounds, found.left_out, found.calm) == (2, 0, False)
    assert any(
        note.startswith(f"The machine was never calm for {found.label} (other programs took up to 0.7")
        for note in summary.notes
    )
    assert told.verdict(summary).state == "warn"


# The summary.
def test_a_row_has_everything_about_its_variant(full):
    rows = {row.label: row for row in full.rows}
    assert list(rows) == [kind.variant.label for kind in KINDS[:8]]
    q4 = rows["moondream2-q4.gguf"]
    assert q4.stages["decode_rate"].median == pytest.approx(1000 / 61, rel=0.05)
    assert q4.asks["street"]["vision_crop"].median == pytest.approx(640, rel=0.05)
    assert q4.asks["cat, short"]["vision_crop"].median == pytest.approx(1280, rel=0.05)  # two crops, encoded once
    assert (q4.loads["cold"].median, q4.loads["warm"].median) == (1900, 420)
    assert q4.memory["above_baseline"].median == pytest.approx(q4.memory["peak"].median - 96)
    assert q4.limits["decode_rate"] == pytest.approx(17.2e9 / (0.86e9 + 9.1e7))
    assert q4.limits["vision_crop"] == pytest.approx(2.6e10 / 240e9 * 1000)
    bf16 = next(a for a in q4.against if a.label == "original bf16").ratios
    assert bf16["decode_rate"].value == pytest.approx(230 / 61, rel=0.05)
    assert bf16["peak"].value == pytest.approx(1820 / 4600, rel=0.02)
    assert all(r.low <= r.value <= r.high for r in bf16.values())
    assert [a.label for a in rows["original f32"].against] == ["original bf16"]
    assert rows["moondream2-f32.onnx"].state == "out_of_memory"
    assert [row.label for row in full.unavailable] == ["moondream2-q4.onnx on cuda"]
    json.dumps(full.as_dict(), allow_nan=False)


def test_a_fast_wrong_model_does_not_win(full):
    wrong = next(row for row in full.rows if row.disagrees)
    assert wrong.label == "wrong-mask-q4.gguf"
    assert wrong.stages["end_to_end"].median == min(r.stages["end_to_end"].median for r in full.rows if r.stages)
    verdict = told.verdict(full)
    assert (verdict.state, verdict.word) == ("warn", "Fastest that agrees: moondream2-q4.gguf")
    assert any("wrong-mask" in line for line in verdict.lines)
    table = tables.results(full)
    row = next(cells for cells in table.rows if cells[0] == wrong.label)
    assert row[1:3] == ("disagrees", "31 %\n(0.086)")
    assert table.rows.index(row) in table.bad


def test_what_may_be_as_fast_is_named():
    twin = replace(KINDS[4], variant=replace(KINDS[4].variant, label="twin.gguf"))
    lines = told.verdict(summarise(run([KINDS[0], KINDS[4], twin], again=False))).lines
    (alike,) = (line for line in lines if line.startswith("Perhaps as fast, the intervals overlap: "))
    assert "gguf" in alike
    assert "original" not in alike


def test_the_ranking_at_first_is_not_the_ranking_at_last(full):
    q4 = next(s for s in full.sustained if s.label == "moondream2-q4.gguf").curves["decode_rate"]
    assert (q4.first, q4.last) == pytest.approx((1000 / 63, 1000 / 105), rel=0.05)
    assert 18 <= len(q4.points) <= 21
    assert any(note.startswith("The ranking changes under load on local: moondream2-q4.gguf,") for note in full.notes)


@pytest.mark.parametrize(
    ("name", "state", "word"),
    [
        ("begun", "bad", "Nothing was measured"),
        ("failed", "bad", "Nothing was measured"),
        ("load", "good", "Measured under load only"),
        ("elsewhere", "warn", "Fastest, not compared with an original: "),
        ("single", "good", "Fastest that agrees: "),
    ],
)
def test_the_verdict_says_what_there_is(summaries, name, state, word):
    verdict = told.verdict(summaries[name])
    assert verdict.state == state
    assert verdict.word.startswith(word)


def test_the_reader_is_told_what_weakens_the_numbers(summaries):
    assert any(note.startswith("A single process each: ") for note in summaries["single"].notes)
    assert any(note.startswith("Nothing was compared") for note in summaries["elsewhere"].notes)
    lost = record(KINDS[0], 1, 5, Reply("failed", "no such checkpoint"), "reference")
    assert any("no such checkpoint" in note for note in summarise([lost, *run()[2:8]]).notes)
    tired = record(KINDS[0], 1, 5, Reply("hung", "no end after 1800 s"), "sustain")
    (note,) = (note for note in summarise([tired, *run()[2:8]]).notes if "under load" in note)
    assert note == "original f32 under load on local was not measured (hung): no end after 1800 s"


def test_a_unit_that_nobody_asked_for_is_only_listed():
    absent = next(r for r in run() if r.reply.status == "unavailable")
    asked, listed = (summarise([*run(KINDS[:7]), replace(absent, round=n)]) for n in (1, 0))
    why = f"{absent.variant.label} is not available on local: {absent.reply.reason}"
    assert why in asked.notes
    assert why not in listed.notes
    assert [dict(told.key_numbers(s))["variants measured"] for s in (asked, listed)] == ["7 of 8", "7 of 7"]
    assert told.verdict(summarise([replace(absent, round=1)])).lines == (
        f"{absent.variant.label}: {absent.reply.reason}",
    )


def test_an_answer_is_more_than_its_first_token(full):
    row = next(r for r in full.rows if r.label == "moondream2-q4.gguf")
    first, whole = dict(tables.parts(row.stages)), dict(tables.parts(row.stages, "end_to_end"))
    assert sum(whole.values()) == pytest.approx(row.stages["end_to_end"].median, rel=0.01)  # medians do not add up
    assert whole.keys() - first.keys() == {"decode"}


def test_a_device_that_tells_little_still_has_a_row():
    """llama-bench's kind of numbers: a decode rate, no whole answers."""
    (few,) = (r for r in run(KINDS[4:5], 1, again=False) if r.kind == "measure")
    samples = tuple(replace(s, ms={"decode": s.ms["decode"]}, token_ms=()) for s in few.reply.samples)
    few = replace(few, reply=Reply("ok", samples=samples, agreement=few.reply.agreement))
    summary = summarise([few])
    assert told.verdict(summary).word == "Fastest that agrees: moondream2-q4.gguf"
    assert re.fullmatch(r"Then 1[567].* tokens/s\.", told.verdict(summary).lines[0])
    assert "Decode rate" in page.render(summary, [few])
    assert "moondream2" in markdown.render(summary)


# The forms.
@pytest.mark.parametrize("name", PAGES)
def test_markdown_and_the_page_have_the_same_numbers(summaries, rendered, name):
    text = markdown.render(summaries[name])
    text.encode("utf-8")
    assert not re.search(r"(?<!\\)[<>`]", text)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    shown = "\n".join(read(rendered[name]).text)
    for row in tables.results(summaries[name]).rows:
        for cell in row[2:]:
            first = cell.split("\n")[0]
            assert first in text
            assert first in shown


@pytest.mark.parametrize("name", PAGES)
def test_csv_is_one_long_table(summaries, name):
    rows = list(csv.DictReader(io.StringIO(csv_text.render(summaries[name]))))
    assert all(None not in row and None not in row.values() for row in rows)
    assert {row["label"] for row in rows} == {
        f"'{r.label}" if r.label[0] in "=+-@" else r.label.replace("\ud800", "\ufffd")
        for r in (*summaries[name].rows, *summaries[name].unavailable)
    }
    numbers = [float(row["median"]) for row in rows if row["median"]]
    assert all(map(math.isfinite, numbers))
    if name == "full":
        found = [r for r in rows if r["label"] == "moondream2-q4.gguf" and r["stage"] == "first_token"]
        assert [r["ask"] for r in found] == ["*", "cat, short", "street", "caption"]
        assert [r["n"] for r in found] == ["27", "9", "9", "9"]
        assert float(found[0]["low"]) <= float(found[0]["median"]) <= float(found[0]["high"])


def test_a_formula_stays_text():
    kind = replace(KINDS[2], variant=replace(KINDS[2].variant, label="=HYPERLINK(1)"))
    assert "'=HYPERLINK(1)" in csv_text.render(summarise(run((kind,), 1, again=False)))


@pytest.mark.parametrize("name", PAGES)
def test_the_page_stands_alone(rendered, name):
    text = rendered[name]
    text.encode("utf-8")
    found = read(text)
    assert not {"script", "img", "link", "iframe", "object", "form", "base"} & set(found.tags)
    assert not [a for a, _ in found.attributes if a.startswith("on") or a in ("src", "href", "style", "xlink:href")]
    assert not re.search(r"https?://|url\(|@import", text)
    assert "nan" not in {v for _, v in found.attributes}


def test_the_page_says_what_is_there_and_why_not(rendered):
    text = "\n".join(read(rendered["full"]).text)
    for words in (
        "the process was ended by the system", "onnxruntime has no cuda here", "no counter: /sys/class/powercap",
        "TTFT: from the picture's file in hand", "The machine through the run", "Under load: decode",
        "What is written on the sign", "Answer by answer", "a cat",
        ENVIRONMENT["cpu"], "25367e4", "1024 \u00d7 768", "Decode rate against size",
    ):  # fmt: skip
        assert words in text


def test_a_large_run_stays_a_small_page():
    asks = tuple(replace(ASKS[i % 3], name=f"question {i}") for i in range(5))
    work = replace(WORK, asks=asks)
    kinds = [
        replace(k, variant=replace(k.variant, label=f"{k.variant.label} {i}")) for i in range(4) for k in KINDS[2:7]
    ]
    pool = run(kinds, 1, again=False)
    records = []
    for round in range(1, 11):
        for found in pool:
            samples = tuple(
                replace(s, ask=ask.name) for ask in asks for s in found.reply.samples[:3] if found.kind == "measure"
            )
            counts = tuple(replace(found.reply.counts[0], ask=a.name) for a in asks) if found.reply.counts else ()
            answer = replace(found.reply, samples=samples, counts=counts)
            records.append(replace(found, job=f"{round}{found.job}", round=round, work=work, reply=answer))
    text = page.render(summarise(records), records)
    assert len(text) < 2_000_000
    assert text.count('<svg class="plot"') >= 10


# In the browser.
@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.mark.parametrize(("width", "dark"), SCHEMES)
@pytest.mark.parametrize("name", PAGES)
def test_the_page_reads_well(browser, rendered, tmp_path, name, width, dark):
    path = tmp_path / "report.html"
    path.write_text(rendered[name], encoding="utf-8")
    opened = browser.open(path.as_uri(), width=width, height=740, dark=dark)
    opened.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true })")
    assert opened.errors == []
    assert opened.requests == [path.as_uri()]
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.evaluate("document.body.scrollWidth") <= width
    least = opened.evaluate(CONTRAST)
    assert least[0][0] >= 4.5, least
    assert opened.evaluate(CROSSING) == []
    assert opened.evaluate(f"document.querySelectorAll('svg.plot').length ? {LETTERS} : 11") >= 11
    opened.call("Page.close")


def test_a_phone_shows_agreement_beside_speed(browser, rendered, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(rendered["full"], encoding="utf-8")
    opened = browser.open(path.as_uri(), width=360, height=740)
    right = "[...document.querySelector('table').rows[1].cells].slice(0, 3).map(c => c.getBoundingClientRect().right)"
    assert all(edge <= 346 for edge in opened.evaluate(right))
    opened.call("Page.close")
