"""The original read layer by layer gives what the whole original gives; an export that parts from it is caught."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vlmedge import pipeline
from vlmedge.limits import Limits
from vlmedge.loading import describe, open_original
from vlmedge.parity import pictures
from vlmedge.parity.compare import compare
from vlmedge.parity.judge import judge
from vlmedge.parity.trace import TOKENS, caption_ids, needed_context, trace
from vlmedge.reference.streamed import StreamedReference
from vlmedge.reference.threads import torch_threads

TINY = Path(__file__).parent / "data/moondream2/tiny-mha"
PICTURES = TINY.parent / "images"


@pytest.fixture(scope="module")
def found():
    return describe(TINY)


@pytest.fixture(scope="module")
def ours(found):
    with open_original(found, threads=1, context=needed_context(found.spec)) as model:
        return trace(model, {"picture": PICTURES / "big.png"})


@pytest.fixture(scope="module", params=[False, True], ids=["from the pixels", "same inputs"])
def original(found, ours, request):
    return judge(ours.record, found.spec, found.tensors, same_inputs=request.param, threads=1)


def stages(spec, record, judged, limits=None):
    return {s.stage: s for s in compare(record, judged, spec, "original", limits).stages}


def limits(**given):
    return Limits("original", "a test's", **given)


def test_streamed_equals_whole(found, ours, original):
    """Every call of every skill, a picture of several crops included."""
    assert len(ours.record.sights) == 3
    assert ours.record.sights[2].tiling != (1, 1)
    result = compare(ours.record, original, found.spec, "original", limits(logits=1e-4))
    assert [s.stage for s in result.stages] == ["features", "projected", "logits", "tokens", "regions", "boxes"]
    assert all(s.outcome in ("passed", "measured") for s in result.stages)
    assert all(s.relative_rms < 1e-5 for s in result.stages), result.stages
    assert {t.reading for t in result.tokens} == {"small picture", "large picture", "picture"}
    assert all(t.token == t.reference_token and t.kl < 1e-8 for t in result.tokens)
    numbers = {s.stage: s.numbers for s in result.stages}
    assert numbers["boxes"]["equal"] == numbers["boxes"]["choices"] >= 8 + 4  # two boxes and two points
    assert numbers["boxes"]["iou"] == 1
    assert numbers["tokens"]["positions"] == len(result.tokens) > TOKENS
    assert "first_divergence" not in numbers["tokens"]


def test_a_prompts_first_token_may_be_a_banned_one_and_later_ones_may_not(found, ours, original):
    """What is compared is what the product would have chosen."""
    banned = tuple(range(found.spec.decoder.vocab - 1))
    spec = replace(found.spec, prompt=replace(found.spec.prompt, banned=banned))
    later = {t.token for t in compare(ours.record, original, spec, "original", None).tokens if t.index}
    assert later == {found.spec.decoder.vocab - 1}


def noisy(call, name, scale):
    noise = np.random.default_rng(0).standard_normal(getattr(call, name).shape).astype(np.float32)
    return replace(call, **{name: getattr(call, name) + scale * noise})


@pytest.mark.parametrize(
    ("stage", "kind", "name", "limit"),
    [
        ("features", "vision", "features", "features"),
        ("projected", "projections", "rows", "projected"),
        ("logits", "forwards", "logits", "logits"),
        ("regions", "heads", "outputs", "regions"),
    ],
)
def test_the_stage_that_parts_is_named(found, ours, original, stage, kind, name, limit):
    calls = list(getattr(ours.record, kind))
    at = -1 if kind == "vision" else next(i for i, c in enumerate(calls) if getattr(c, "read", None) is None)
    calls[at] = noisy(calls[at], name, 10)
    record = replace(ours.record, **{kind: calls})
    result = stages(found.spec, record, original, limits(**dict.fromkeys((limit,), 1e-2)))
    assert [s for s, r in result.items() if r.outcome == "failed"] == [stage]
    assert "at most 1.0e-02 is allowed" in result[stage].why


def test_numbers_that_are_none_fail_whatever_the_profile(found, ours, original):
    for value in (np.nan, np.inf):
        calls = [replace(c, logits=np.full_like(c.logits, value)) for c in ours.record.forwards]
        broken = replace(ours, record=replace(ours.record, forwards=calls))
        result = stages(found.spec, broken.record, original)
        assert result["logits"].outcome == result["tokens"].outcome == "failed"
        assert result["logits"].relative_rms is None, "JSON has no infinity"
        assert (broken.broken(), ours.broken()) == ("logits", None)
    judged = replace(original, features=tuple(np.full_like(f, np.inf) for f in original.features))
    assert stages(found.spec, ours.record, judged)["features"].why == "numbers are not finite or of another shape"


def test_another_token_is_found_and_near_ties_are_told_apart(found, ours, original):
    at = next(i for i, f in enumerate(ours.record.forwards) if f.decodes and f.chooses)
    wanted = original.logits[at]
    second = int(np.argsort(wanted)[-2])
    gap = float(wanted.max() - wanted[second])
    turned = wanted.copy()
    turned[second] += 2 * gap
    forwards = list(ours.record.forwards)
    forwards[at] = replace(forwards[at], logits=turned)
    record = replace(ours.record, forwards=forwards)
    rms = float(np.sqrt(np.mean(np.square(wanted))))
    tie = stages(found.spec, record, original, limits(logits=gap / rms))["tokens"]
    assert (tie.outcome, tie.ambiguous, tie.numbers["top1"] < 1) == ("passed", 1, True)
    real = stages(found.spec, record, original, limits(logits=gap / rms / 8))["tokens"]
    assert (real.outcome, real.ambiguous) == ("failed", 0)
    assert f"is {second} instead of {int(wanted.argmax())}" in real.why
    assert stages(found.spec, record, original)["tokens"].outcome == "measured", "without limits nothing is judged"


def test_a_bin_that_is_another(found, ours, original):
    at = next(i for i, h in enumerate(ours.record.heads) if h.name == "coord_decoder" and h.read is not None)
    heads = list(ours.record.heads)
    heads[at] = replace(heads[at], outputs=heads[at].outputs[::-1].copy())
    record = replace(ours.record, heads=heads)
    boxes = stages(found.spec, record, original, limits(logits=1e-3))["boxes"]
    assert boxes.outcome == "failed"
    assert boxes.numbers["equal"] == boxes.numbers["choices"] - 1
    assert boxes.numbers["iou_least"] < 1


def test_the_callers_threads_stay(found):
    before = torch.get_num_threads()
    seen = []
    with open_original(found, threads=before + 1, context=needed_context(found.spec)) as model:
        seen.append(torch.get_num_threads())
        model.session.embed(np.array([1], np.int32))
        seen.append(torch.get_num_threads())
        assert model.session.info()["threads"] == before + 1
    streamed = StreamedReference(found.spec, found.tensors, threads=before + 1)
    streamed.region([*pictures.region_inputs(found.spec.decoder.width).items()])
    assert [*seen, torch.get_num_threads()] == [before] * 3
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    with torch_threads(None):
        assert torch.get_num_threads() == before


# ---- what is asked ------------------------------------------------------------------------------------------------


def test_the_prompt_of_a_trace(found):
    rules = found.spec.prompt
    assert caption_ids(rules) == (0, (1, 304, 2, 303, 3))
    without = {name: parts for name, parts in rules.templates.items() if not name.startswith("caption/")}
    start, ids = caption_ids(replace(rules, templates=without))
    assert start == 0
    assert ids
    assert caption_ids(replace(rules, templates={})) == (rules.stop[0], ())


@pytest.mark.parametrize("templates", [{"caption": None}, dict.fromkeys(("caption", "query", "detect", "point"))])
def test_a_model_without_captions_is_exported(forgery, tmp_path, templates):
    """Asked by another skill, or (where it has none) with the picture alone."""
    forgery.config["config"]["tokenizer"]["templates"] |= templates
    bundle = pipeline.export(forgery.write(), "gguf", "f32", tmp_path / "out", threads=1)
    assert "caption" not in bundle.manifest.skills
    assert bundle.manifest.verification["verified"]
    tokens = next(s for s in bundle.manifest.verification["stages"] if s["stage"] == "tokens")
    assert tokens["numbers"]["positions"] > 0
