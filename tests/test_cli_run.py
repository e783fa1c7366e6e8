"""`vlmedge run`: every skill, on a bundle and on the original, in words and as JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

RUN_KEYS = {
    "skill", "text", "tokens", "prompt_tokens", "image_tokens", "crops", "boxes", "points", "finish", "runtime",
    "timings_ms", "peak_rss_mb", "session",
}  # fmt: skip
SKILLS = {
    "query": ("What is this?",),
    "caption": ("--skill", "caption", "--length", "short"),
    "detect": ("--skill", "detect", "--object", "cat"),
    "point": ("--skill", "point", "--object", "cat"),
    "gaze": ("--skill", "gaze", "--eye", "0.4,0.3"),
}


@pytest.fixture(params=["bundle", "checkpoint"])
def source(request, bundle, golden):
    return bundle if request.param == "bundle" else golden


@pytest.fixture
def ask(succeed, source, photo):
    """Run with a picture and a few tokens."""

    def run(*words: object, image: object = photo):
        return succeed("run", source, image, *words, "--threads", 1, "--max-tokens", 6)

    return run


@pytest.mark.parametrize("skill", SKILLS)
def test_json_of_every_skill(ask, skill, source, bundle):
    done = ask(*SKILLS[skill], "--json")
    data = done.data
    assert done.err == ""
    assert set(data) == RUN_KEYS
    assert data["skill"] == skill
    assert data["runtime"] == ("llamacpp" if source == bundle else "torch")
    assert data["image_tokens"] == 729
    assert data["crops"] == 2
    assert data["finish"] in ("stop", "length")
    assert all(set(box) == {"x_min", "y_min", "x_max", "y_max"} for box in data["boxes"])
    assert all(set(point) == {"x", "y"} for point in data["points"])
    assert data["timings_ms"]["total"] >= data["timings_ms"]["vision"] > 0
    assert data["peak_rss_mb"] > 10
    assert data["session"]["threads"] >= 1
    assert data["prompt_tokens"] > 0
    assert 0 < len(data["tokens"]) <= 6 or skill in ("detect", "point", "gaze")


@pytest.mark.parametrize("skill", SKILLS)
def test_words_of_every_skill(ask, skill):
    done = ask(*SKILLS[skill])
    data = ask(*SKILLS[skill], "--json").data
    assert done.err == ""
    if skill in ("query", "caption"):
        assert done.out == data["text"] + "\n"
    else:
        found = [f"box {' '.join(f'{v:.3f}' for v in box.values())}" for box in data["boxes"]]
        found += [f"point {' '.join(f'{v:.3f}' for v in point.values())}" for point in data["points"]]
        assert done.out.splitlines() == (found or ["nothing found"])


def test_the_skill_follows_from_the_question(ask):
    assert ask("--json").data["skill"] == "caption"
    assert ask("What?", "--json").data["skill"] == "query"
    assert ask("--eye", "0.4,0.3", "--json").data["skill"] == "gaze"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--reasoning",), "--reasoning goes with --skill query, this is caption"),
        (("--skill", "detect", "--object", "cat", "--ref", "0.1,0.2"), "--ref goes with --skill query"),
        (("What?", "--object", "cat"), "--object goes with --skill detect or point, this is query"),
        (("--object", "cat"), "--object goes with --skill detect or point, this is caption"),
        (("What?", "--skill", "caption"), "caption takes no QUESTION"),
        (("What?", "--eye", "0.1,0.2"), "gaze takes no QUESTION"),
        (("What?", "--length", "short"), "--length goes with --skill caption, this is query"),
        (("What?", "--skill", "query", "--face", "0.1,0.2,0.3,0.4"), "--face goes with --skill gaze"),
        (("cat", "--skill", "point", "--object", "cat"), "point takes one name"),
        (("--face", "0.3,0.2,0.1,0.4"), "--face takes a box with X < X2 and Y < Y2"),
        (("What?", "--temperature", "1e-310"), "temperature must be 0 (greedy) or at least 0.001"),
        (("What?", "--dtype", "f32"), "--dtype is for the original"),
    ],
)
def test_options_that_would_be_ignored(refused, bundle, photo, words, says):
    assert says in refused("run", bundle, photo, *words, code=2)


def test_lean_memory_is_for_bundles(refused, golden, photo):
    assert "--memory lean is for bundles" in refused("run", golden, photo, "What?", "--memory", "lean", code=2)


def test_streaming_prints_the_same(ask):
    assert ask("What is this?", "--stream").out == ask("What is this?").out


def test_text_only(ask):
    data = ask("What is this?", "--json", image="-").data
    assert (data["image_tokens"], data["crops"]) == (0, 0)
    assert "vision" not in data["timings_ms"]


def test_references(ask):
    plain = ask("What is this?", "--json").data
    pointed = ask("What is this?", "--ref", "0.2,0.3", "--ref", "0.1,0.1,0.5,0.6", "--json").data
    assert pointed["prompt_tokens"] == plain["prompt_tokens"] + 2 + 3


def test_reasoning(ask):
    data = ask("What is this?", "--reasoning", "--json").data
    assert set(data) == RUN_KEYS | {"reasoning"}
    assert set(data["reasoning"]) == {"text", "tokens", "grounding"}


def test_reasoning_with_references_is_refused(refused, source, photo):
    line = refused("run", source, photo, "What?", "--ref", "0.2,0.3", "--reasoning", "--threads", 1)
    assert "does not work in the original either" in line


def test_several_pictures_are_refused(refused, source, photo):
    line = refused("run", source, photo, "Compare.", "--image", photo, "--threads", 1)
    assert "takes one picture at a time, the message has 2" in line
    assert "exactly one picture, not 2" in refused("run", source, photo, "--image", photo, code=2)


def test_a_question_that_is_too_long(refused, source, photo):
    assert "positions" in refused("run", source, photo, "why " * 5000, "--threads", 1)


def test_the_seed_decides(ask):
    words = ("What is this?", "--temperature", "5", "--json", "--seed")
    first, again = (ask(*words, "7").data["tokens"] for _ in range(2))
    assert first == again
    assert any(ask(*words, str(seed)).data["tokens"] != first for seed in range(3))


def test_drawing(ask, tmp_path, photo):
    data = ask(*SKILLS["point"], "--json", "--draw", tmp_path / "out.png").data
    with Image.open(tmp_path / "out.png") as drawn, Image.open(photo) as original:
        assert drawn.size == original.size
        assert np.array_equal(np.array(drawn), np.array(original.convert("RGB"))) == (not data["points"])


def test_drawing_where_it_cannot_be(refused, bundle, photo, tmp_path):
    words = ("run", bundle, photo, *SKILLS["point"], "--draw")
    assert "'.txt' is no picture format" in refused(*words, tmp_path / "out.txt")
    assert "there is no folder" in refused(*words, tmp_path / "no/out.png")
    assert list(tmp_path.iterdir()) == []


def test_a_shipped_picture(succeed, refused, bundle):
    done = succeed("run", bundle, "demo:shapes", "What?", "--threads", 1, "--max-tokens", 2, "--json")
    assert json.loads(done.out)["image_tokens"] == 729
    assert "there is no demo picture 'shape'; did you mean 'shapes'?" in refused(
        "run", bundle, "demo:shape", "What?", code=2
    )


def test_lean_memory_answers_the_same(succeed, bundle, photo):
    words = ("run", bundle, photo, "What is this?", "--threads", 1, "--max-tokens", 6)
    assert succeed(*words, "--memory", "lean").out == succeed(*words).out


def test_the_original_in_other_types(succeed, golden, photo):
    for dtype in ("bf16", "f16"):
        succeed("run", golden, photo, "What?", "--threads", 1, "--max-tokens", 2, "--dtype", dtype)
