"""The original read layer by layer gives what the whole original gives; an export that parts from it is caught."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vlmedge import pipeline
from vlmedge.loading import describe, open_original
from vlmedge.parity import pictures
from vlmedge.parity.original import judge
from vlmedge.parity.stages import compare, difference
from vlmedge.parity.trace import TOKENS, caption_ids, needed_context, trace
from vlmedge.reference.streamed import StreamedReference
from vlmedge.reference.threads import torch_threads

TINY = Path(__file__).parent / "data/moondream2/tiny-mha"


@pytest.fixture(scope="module")
def found():
    return describe(TINY)


@pytest.fixture(scope="module")
def ours(found):
    with open_original(found, threads=1, context=needed_context(found.spec)) as model:
        return trace(model.spec, model.session)


@pytest.fixture(scope="module")
def original(found, ours):
    return judge(found.spec, found.tensors, ours, threads=1)


def test_streamed_equals_whole(ours, original):
    for name in ("features", "local"):
        assert difference(getattr(original, name), getattr(ours, name))[0] < 1e-6, name
    for judgement, reading in ((original.small, ours.small), (original.stitched, ours.stitched)):
        assert difference(judgement.projected, reading.projected)[0] < 1e-5
        assert difference(judgement.logits, reading.logits)[0] < 1e-5
        assert judgement.choices == reading.tokens
        assert len(reading.tokens) <= TOKENS
    assert set(original.regions) == {"coord_encoder", "size_encoder", "coord_decoder", "size_decoder"}
    for name, values in original.regions.items():
        assert difference(values, ours.regions[name])[0] < 1e-6, name


def test_what_agrees_agrees(ours, original):
    result = compare(ours, original)
    assert [s.stage for s in result.stages] == ["features", "projected", "logits", "regions"]
    assert result.first_divergence is None
    assert result.failing(dict.fromkeys(("features", "projected", "logits"), 1e-4)) is None


def test_the_first_stage_that_parts_is_named(ours, original):
    rng = np.random.default_rng(0)
    worse = replace(ours, local=ours.local + 0.1 * rng.standard_normal(ours.local.shape).astype(np.float32))
    failing = compare(worse, original).failing({"features": 1e-2, "projected": 1e-2, "logits": 1e-2})
    assert failing is not None
    assert failing.stage == "features"
    assert "at most 1.0e-02 is allowed" in failing.why


@pytest.mark.parametrize("tolerance", [{}, {"logits": 1.0}])
def test_numbers_that_are_none_fail_whatever_the_profile(ours, original, tolerance):
    broken = replace(ours, small=replace(ours.small, logits=np.full_like(ours.small.logits, np.nan)))
    failing = compare(broken, original).failing(tolerance)
    assert failing is not None
    assert failing.stage == "logits"
    assert (broken.broken(), ours.broken()) == ("logits", None)
    judged = replace(original, features=np.full_like(original.features, np.inf))
    assert compare(ours, judged).failing({}).stage == "features"


def test_a_head_that_differs_is_found(ours, original):
    regions = {**ours.regions, "size_decoder": ours.regions["size_decoder"] + 1}
    failing = compare(replace(ours, regions=regions), original).failing({"regions": 1e-2})
    assert failing is not None
    assert failing.stage == "regions"


def changed_at(reading, index):
    tokens = list(reading.tokens)
    tokens[index] = (tokens[index] + 1) % 512
    return replace(reading, tokens=tuple(tokens))


def test_another_token_is_found_and_near_ties_are_told_apart(ours, original):
    changed = replace(ours, small=changed_at(ours.small, 0))
    result = compare(changed, original)
    assert (result.first_divergence, result.near_tie) == (0, False)
    assert result.failing({}) is None
    failing = result.failing({}, lossless=True)
    assert failing is not None
    assert failing.stage == "greedy tokens"
    noisy = replace(changed, small=replace(changed.small, logits=changed.small.logits + 100))
    result = compare(noisy, original)
    assert result.near_tie
    assert result.failing({}, lossless=True) is None


def test_a_near_tie_hides_no_other_token(ours, original):
    noisy = replace(ours.small, logits=ours.small.logits + 100)
    both = replace(ours, small=changed_at(noisy, 0), stitched=changed_at(ours.stitched, 3))
    result = compare(both, original)
    assert (result.first_divergence, result.near_tie) == (3, False)


def test_the_callers_threads_stay(found):
    before = torch.get_num_threads()
    seen = []
    with open_original(found, threads=before + 1, context=needed_context(found.spec)) as model:
        seen.append(torch.get_num_threads())
        model.session.embed(np.array([1], np.int32))
        seen.append(torch.get_num_threads())
        assert model.session.info()["threads"] == before + 1
    streamed = StreamedReference(found.spec, found.tensors, threads=before + 1)
    streamed.region(pictures.region_inputs(found.spec.decoder.width))
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
    assert bundle.manifest.verification["tokens"] > 0
