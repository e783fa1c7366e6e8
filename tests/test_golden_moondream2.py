"""The original and ONNX exports of it against upstream's own outputs on the tiny golden checkpoint: every stage, skill.

GGUF is compared in test_llamacpp.py.
"""

import json
from pathlib import Path

import numpy as np
import pytest

import vlmedge
from vlmedge.generate import Prefix
from vlmedge.prompt import PictureSpan, render

DATA = Path(__file__).parent / "data/moondream2"
FOLDER = DATA / "tiny-mha"
GOLDEN = json.loads((FOLDER / "results_fp32.json").read_text())
STAGES = np.load(FOLDER / "stages.npz")
PICTURES = {name: DATA / f"images/{name}.png" for name in ("small", "big")}
# Relative RMS difference of a stage, by what computes it.
NEAR = {"torch": 1e-5, "onnxruntime": 1e-4}


@pytest.fixture(scope="module", params=["original", "onnx-ort", "onnx-portable"])
def model(request, tmp_path_factory):
    format_, _, flavour = request.param.partition("-")
    folder = FOLDER
    if flavour:
        out = tmp_path_factory.mktemp(request.param) / "f32.onnx"
        folder = vlmedge.export(FOLDER, format_, "f32", out, flavour=flavour, verify=False, threads=1).path
    with vlmedge.load(folder, threads=1) as opened:
        assert opened.session.runtime == ("onnxruntime" if flavour else "torch")
        yield opened


def relative(ours, golden):
    golden = np.asarray(golden, np.float32)
    assert ours.shape == golden.shape
    return float(np.linalg.norm(ours - golden) / np.linalg.norm(golden))


@pytest.mark.parametrize("picture", PICTURES)
def test_stages(model, picture):
    golden = {key.partition(".")[2]: STAGES[key] for key in STAGES.files if key.startswith(picture)}
    step = -(-729 // golden["projected"].shape[0])  # the file holds every step-th row
    ids = GOLDEN[picture]["caption_short"]["prompt_ids"]
    stages, near = model.stages([PICTURES[picture]], ids), NEAR[model.session.runtime]
    assert relative(stages["features"][:, ::step], golden["features"]) < near
    assert relative(stages["projected"][::step], golden["projected"]) < near
    assert stages["pixels"].shape == (len(golden["features"]), 3, 378, 378)
    assert stages["logits"].shape == (730 + len(ids), 512)
    assert relative(stages["logits"][-1], golden["caption_logits"]) < near


@pytest.mark.parametrize("length", ["short", "normal", "long"])
def test_captions(model, length):
    for name, picture in PICTURES.items():
        if f"caption_{length}" in GOLDEN[name]:
            assert list(model.caption(picture, length).tokens) == GOLDEN[name][f"caption_{length}"]["tokens"]


@pytest.mark.parametrize("case", ["query", "query2"])
def test_queries(model, case):
    golden = GOLDEN["small"][case]
    answer = model.query(PICTURES["small"], golden["question"])
    assert (list(answer.tokens), answer.text) == (golden["tokens"], golden["text"])


def test_query_without_a_picture(model):
    golden = GOLDEN["query_text_only"]
    answer = model.query(None, "What color is the cat?")
    assert (list(answer.tokens), answer.text) == (golden["tokens"], golden["text"])
    assert (answer.image_tokens, answer.crops, answer.prompt_tokens) == (0, 0, len(golden["prompt_ids"]))


def test_query_with_spatial_references(model):
    golden = GOLDEN["small"]["query_spatial"]
    answer = model.query(PICTURES["small"], golden["question"], spatial_refs=golden["spatial_refs"])
    assert (list(answer.tokens), answer.text) == (golden["tokens"], golden["text"])


def test_query_with_reasoning(model):
    """Upstream's run was cut at 48 tokens; the answer follows a thought that was cut."""
    golden = GOLDEN["small"]["query_reasoning"]
    answer = model.query(PICTURES["small"], golden["question"], reasoning=True, max_tokens=48)
    assert (answer.text, answer.reasoning.text) == (golden["text"], golden["reasoning"]["text"])
    for ours, theirs in zip(answer.reasoning.grounding, golden["reasoning"]["grounding"], strict=True):
        assert (ours.start, ours.end) == (theirs["start_idx"], theirs["end_idx"])
        assert [(p.x, p.y) for p in ours.points] == [tuple(p) for p in theirs["points"]]


def test_detect(model):
    golden = GOLDEN["small"]["detect"]
    answer = model.detect(PICTURES["small"], golden["object"])
    assert list(answer.tokens) == golden["boundary_tokens"]
    for ours, theirs in zip(answer.boxes, golden["objects"], strict=True):
        for key, value in theirs.items():
            assert getattr(ours, key) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(("picture", "most"), [("small", None), ("big", 8)])
def test_point(model, picture, most):
    """Upstream's run on the big picture was limited to 8 objects."""
    golden = GOLDEN[picture]["point"]
    answer = model.point(PICTURES[picture], golden["object"], max_objects=most)
    assert list(answer.tokens) == golden["boundary_tokens"][: len(answer.tokens)]
    assert [{"x": p.x, "y": p.y} for p in answer.points] == golden["points"]


def test_gaze(model):
    golden = GOLDEN["small"]["gaze"]
    (point,) = model.gaze(PICTURES["small"], golden["eye"]).points
    assert {"x": point.x, "y": point.y} == golden["gaze"]


def test_prompts_are_upstreams(model):
    """Ids of every prompt, slots of spatial references included."""
    for name, key in (("query", "question"), ("detect", "object"), ("point", "object"), ("gaze", None)):
        golden = GOLDEN["small"][name]
        text = golden.get(key, "") if key else ""
        segments = render(model.spec.prompt, name, model.tokenizer, question=text, thing=text, eye=(0.5, 0.25))
        at = next(i for i, s in enumerate(segments) if isinstance(s, PictureSpan))
        runs = [s.ids for s in segments[at + 1 :] if hasattr(s, "ids")]
        wanted = [golden["before_ids"], golden["after_ids"]] if name == "gaze" else [golden["prompt_ids"]]
        assert [list(r) for r in runs] == wanted


def test_bfloat16_runs_and_stays_near():
    """The original in its own dtype: not equal, but the same model."""
    ids = GOLDEN["small"]["caption_short"]["prompt_ids"]
    with vlmedge.load(FOLDER, dtype="bf16") as half, vlmedge.load(FOLDER) as whole:
        theirs, ours = (opened.stages([PICTURES["small"]], ids) for opened in (half, whole))
    assert 1e-4 < relative(theirs["features"], ours["features"]) < 0.05


def test_cached_prefix_equals_a_fresh_one(model):
    """A question asked after others gets the answer that it gets alone."""
    golden = GOLDEN["small"]["query"]
    model.caption(PICTURES["small"], "short")
    model.query(PICTURES["small"], "How many people are there?")
    assert list(model.query(PICTURES["small"], golden["question"]).tokens) == golden["tokens"]
    model.query(None, "text in between")
    answer = model.query(PICTURES["small"], golden["question"])
    assert list(answer.tokens) == golden["tokens"]
    assert "vision" not in answer.timings_ms


def test_prefix_key_tells_pictures_apart():
    assert Prefix(((1, 2),)).key != Prefix(((1,), (2,), (3,))).key
    assert Prefix(((1, 2),)).length == 2
