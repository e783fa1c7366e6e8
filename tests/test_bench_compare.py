"""One run beside another: a regression is found, chance is not taken for one, and unlike machines are named."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace

import pytest

from tests.bench_records import ASKS, ENVIRONMENT, KINDS, measured, run
from tests.test_report_page import HOSTILE
from vlmedge.device_bench.report.compare import compare, judge
from vlmedge.device_bench.report.compare_text import render_markdown, render_text
from vlmedge.device_bench.report.statistics import Ratio
from vlmedge.device_bench.result import Reply

Q4 = "moondream2-q4.gguf"
SOME = KINDS[1:6]
BASE = run(SOME, seed=1, again=False)


def changed(records, change, label=Q4):
    """The records with one row's changed."""
    return [change(r) if r.variant and r.variant.label == label and r.kind == "measure" else r for r in records]


def row(found, label=Q4):
    return next(r for r in found.rows if r.label == label)


def verdicts(found, label=Q4):
    return {c.quantity: c.verdict for c in row(found, label).changes}


@pytest.mark.parametrize(
    ("ratio", "worse", "verdict"),
    [
        (Ratio(1.2, 1.1, 1.3), "up", "regression"),
        (Ratio(1.2, 0.99, 1.4), "up", "unsure"),
        (Ratio(1.2, None, None), "up", "unsure"),
        (Ratio(1.04, 1.03, 1.05), "up", "same"),
        (Ratio(0.8, 0.7, 0.9), "up", "improvement"),
        (Ratio(0.8, 0.7, 1.1), "up", "unsure"),
        (Ratio(0.96, 0.95, 0.97), "up", "same"),
        (Ratio(0.8, 0.7, 0.9), "down", "regression"),
        (Ratio(1.2, 1.1, 1.3), "down", "improvement"),
        (Ratio(0.0, None, None), "down", "unsure"),
    ],
)
def test_the_rule(ratio, worse, verdict):
    assert judge(ratio, worse, 0.05) == verdict


def test_the_same_run_again_is_the_same():
    for seed in (2, 3, 4):
        found = compare(BASE, run(SOME, seed=seed, again=False), 0.05)
        assert found.regressions == ()
        assert found.comparable
        assert {r.state for r in found.rows} == {"measured"}
    assert {c.ratio.value for c in row(compare(BASE, BASE, 0.0)).changes} == {1.0}


def test_a_slower_row_is_found_and_no_other():
    found = compare(BASE, run(SOME, seed=2, slow={Q4: 1.2}, again=False), 0.05)
    names = ("first token", "vision", "prefill", "decode per token", "answer")
    assert all(verdicts(found)[name] == "regression" for name in names)
    assert verdicts(found)["peak memory"] == verdicts(found)["size"] == "same"
    assert len(found.regressions) == len(names)
    assert all(line.startswith(f"{Q4} (local): ") for line in found.regressions)
    change = row(found).changes[0]
    assert change.ratio.low > 1.05
    assert change.b / change.a == pytest.approx(change.ratio.value)
    assert compare(BASE, run(SOME, seed=2, slow={Q4: 1.2}, again=False), 0.5).regressions == ()
    faster = compare(run(SOME, seed=2, slow={Q4: 1.2}, again=False), BASE, 0.05)
    assert faster.regressions == ()
    assert verdicts(faster)["answer"] == "improvement"


def slowed(found, times):
    samples = tuple(replace(s, ms={k: v * times for k, v in s.ms.items()}) for s in found.reply.samples)
    return replace(found, reply=replace(found.reply, samples=samples))


def test_one_slow_process_of_three_proves_nothing():
    found = compare(BASE, changed(BASE, lambda r: slowed(r, 1.5) if r.round == 2 else r), 0.05)
    assert found.regressions == ()


def test_a_process_alone_tells_of_its_samples_only():
    """Memory has one value then: no interval, so nothing is claimed."""
    alone = [r for r in BASE if r.round == 1]

    def larger(r):
        memory = replace(r.reply.memory, peak=r.reply.memory.peak * 2)
        return slowed(replace(r, reply=replace(r.reply, memory=memory)), 1.5)

    found = verdicts(compare(alone, changed(alone, larger), 0.05))
    assert (found["peak memory"], found["answer"]) == ("unsure", "regression")


def test_a_larger_and_a_wrong_one_are_regressions():
    def worse(r):
        memory = replace(r.reply.memory, peak=r.reply.memory.peak * 1.3)
        agreement = replace(r.reply.agreement, top1=0.88, same_answers=0.2)
        variant = replace(r.variant, bytes=int(r.variant.bytes * 1.2))
        return replace(r, variant=variant, reply=replace(r.reply, memory=memory, agreement=agreement))

    right = changed(BASE, lambda r: replace(r, reply=replace(r.reply, agreement=replace(r.reply.agreement, top1=0.91))))
    found = verdicts(compare(right, changed(BASE, worse), 0.05))
    assert (found["peak memory"], found["size"]) == ("regression", "regression")
    assert found["top-1"] == "regression"  # within 5 %, but from above 0.9 to below
    assert found["answer"] == "same"
    better = verdicts(compare(changed(BASE, worse), right, 0.05))
    assert (better["peak memory"], better["size"], better["top-1"]) == ("improvement", "improvement", "same")


def test_rows_that_are_gone_or_fail_are_regressions():
    failed = changed(BASE, lambda r: replace(r, reply=Reply("crashed", "signal 11")))
    found = compare(BASE, failed, 0.05)
    assert row(found).state == "failing"
    assert found.regressions == (f"{Q4} (local): fails in B: signal 11",)
    once = changed(BASE, lambda r: r if r.round > 1 else replace(r, reply=Reply("hung", "no end after 60 s")))
    assert row(compare(BASE, once, 0.05)).state == "failing"
    assert row(compare(failed, BASE, 0.05)).state == "fixed"
    assert row(compare(failed, failed, 0.05)).state == "broken"
    assert compare(failed, failed, 0.05).regressions == ()
    fewer = run(SOME[:3], seed=2, again=False)
    found = compare(BASE, fewer, 0.05)
    assert found.regressions == (f"{Q4} (local): not in B", "moondream2-q8.gguf (local): not in B")
    assert row(compare(fewer, BASE, 0.05)).state == "new"
    assert compare(fewer, BASE, 0.05).regressions == ()


def test_a_unit_that_was_only_listed_is_no_row():
    absent = replace(next(r for r in run() if r.reply.status == "unavailable"), round=0)
    gpu = measured(random.Random(0), replace(KINDS[3], variant=absent.variant), 1, 60)
    for a, b in (([*BASE, absent], BASE), (BASE, [*BASE, absent]), ([*BASE, absent], [*BASE, absent])):
        found = compare(a, b, 0.05)
        assert found.regressions == ()
        assert absent.variant.label not in [r.label for r in found.rows]
    assert row(compare([*BASE, absent], [*BASE, gpu], 0.05), absent.variant.label).state == "new"
    assert compare([*BASE, gpu], [*BASE, absent], 0.05).regressions == (
        f"{absent.variant.label} (local): fails in B: {absent.reply.reason}",
    )
    strangers = compare(BASE, [gpu], 0.05)
    assert any("no row in common" in note for note in strangers.notes)


def test_unlike_machines_and_works_are_named():
    other = [replace(r, reply=replace(r.reply, environment=ENVIRONMENT | {"cpu": "Cortex-A76"})) for r in BASE]
    found = compare(BASE, other, 0.05)
    assert not found.comparable
    assert "local was AMD EPYC 7R13 Processor in A and is Cortex-A76 in B" in found.notes[0]
    threads = changed(BASE, lambda r: replace(r, reply=replace(r.reply, threads=4)))
    assert "had 2 threads in A and has 4 in B" in " ".join(compare(BASE, threads, 0.05).notes)
    asks = (ASKS[0], replace(ASKS[1], question="Why?"), ASKS[2])
    asked = [replace(r, work=replace(r.work, asks=asks, tokens=64)) for r in BASE]
    notes = " ".join(compare(BASE, asked, 0.05).notes)
    assert "left out of the times: street" in notes
    assert "32 tokens in A and have 64" in notes
    single = run(SOME, 1, seed=5, again=False)
    found = compare(BASE, single, 0.05)
    assert found.comparable
    assert "a single process in A or B" in found.notes[0]


def test_hot_processes_do_not_count():
    rng = random.Random(0)
    hot = [measured(rng, KINDS[4], 4, 9000, 2.0, drift=0.5)]
    assert compare(BASE, [*BASE, *hot], 0.05).regressions == ()


def test_the_forms_say_the_same():
    found = compare(BASE, run(SOME, seed=2, slow={Q4: 1.2}, again=False), 0.05)
    text, marked = render_text(found), render_markdown(found)
    assert text.endswith("5 regressions\n")
    assert "regression: answer " in text
    assert "**Regressions**" in marked
    assert json.loads(json.dumps(found.as_dict()))["regressions"] == list(found.regressions)
    assert all(line in marked for line in found.regressions)
    assert render_text(compare(BASE, BASE, 0.05)).endswith("no regression\n")


def test_hostile_names_stay_names():
    records = changed(BASE, lambda r: replace(r, run=HOSTILE, variant=replace(r.variant, label=HOSTILE)))
    found = compare(records, records[:4], 0.05)
    assert not re.search(r"(?<!\\)[<>`]", render_markdown(found))
    text = render_text(found)
    text.encode("utf-8")
    assert not re.search("[\x00-\x08\x1b]", text)
