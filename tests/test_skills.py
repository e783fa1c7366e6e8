"""What the skills refuse and report, on a session that only counts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests import fakes
from tests.fakes import FakeSession
from vlmedge.checkpoint import open_folder
from vlmedge.errors import UsageError
from vlmedge.families import FAMILIES
from vlmedge.prompt import Tokenizer
from vlmedge.skills import Model
from vlmedge.skills.given import box, point, reference

TINY = Path(__file__).parent / "data/moondream2/tiny-mha"
SPEC = FAMILIES["moondream2"].spec(open_folder(TINY))
PIXELS = np.zeros((20, 20, 3), np.uint8)
END = 0


def model(*script, context=2000):
    spec = replace(SPEC, prompt=replace(SPEC.prompt, max_tokens=4))
    return Model(spec, FakeSession(script, context), Tokenizer((TINY / "tokenizer.json").read_bytes()))


@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), 1e-310])
def test_options_are_checked_before_the_picture_is_encoded(temperature):
    opened = model()
    for ask in (lambda: opened.query(PIXELS, "?", temperature=temperature), lambda: opened.caption(PIXELS, seed=-1)):
        with pytest.raises(UsageError):
            ask()
    assert opened.session.calls == []


def test_reasoning_that_fills_the_context_is_kept():
    """31 is neither a stop token nor one that reasoning knows."""
    positions = model(31).query(None, "?", reasoning=True, max_tokens=1).prompt_tokens
    answer = model(*[31] * 9, context=positions + 4).query(None, "?", reasoning=True, max_tokens=9)
    assert (answer.text, answer.tokens, answer.finish) == ("", (), "length")
    assert answer.reasoning is not None
    assert answer.reasoning.tokens == (31,) * 5


@pytest.mark.parametrize("most", [0, -1])
def test_counts_below_one(most):
    with pytest.raises(UsageError, match=f"max_objects must be 1 or more, not {most}"):
        model().detect(PIXELS, "cat", max_objects=most)
    with pytest.raises(UsageError, match=f"max_tokens must be 1 or more, not {most}"):
        model().query(PIXELS, "?", max_tokens=most)


def test_a_gaze_that_found_its_target_has_ended():
    answer = model(5, 1, 5).gaze(PIXELS, (0.5, 0.5))
    assert (len(answer.points), answer.finish) == (1, "stop")
    assert model(5, 1, 5).point(PIXELS, "cat", max_objects=1).finish == "length"


@pytest.mark.parametrize("given", [(0.5,), (0.5, 1.1), (0.5, float("nan")), ("a", "b"), "ab", 3, None, (0.1, -0.1)])
def test_points_that_are_none(given):
    with pytest.raises(UsageError, match=r"eye is a point \(x, y\) of numbers in 0..1, not"):
        point("eye", given)
    with pytest.raises(UsageError, match="a spatial reference is a point"):
        reference(given)


@pytest.mark.parametrize("given", [(0.5, 0.1, 0.4, 0.2), (0.1, 0.1, 0.2, 0.1), (0.1, 0.2, 0.3), (0, 0, 1, 2)])
def test_boxes_that_are_none(given):
    with pytest.raises(UsageError, match="face is a box"):
        box("face", given)
    with pytest.raises(UsageError, match="a spatial reference is a"):
        model().query(PIXELS, "?", spatial_refs=[given])
    with pytest.raises(UsageError, match="face is a box"):
        model().gaze(PIXELS, face=given)


def test_what_is_given_becomes_floats():
    assert point("eye", np.array([0.25, 1], np.float32)) == (0.25, 1.0)
    assert reference([0, 0.25, 1, 1]) == (0.0, 0.25, 1.0, 1.0)


def test_stages_of_nothing():
    with pytest.raises(UsageError, match="a picture, prompt ids, or both"):
        model().stages([], [])


def test_stages_without_a_picture_are_of_the_given_ids():
    opened = model()
    assert opened.stages([], [0, 1, 2])["logits"].shape[0] == 3
    assert [call[1] for call in opened.session.calls if call[0] == "forward"] == [(0, 1, 2)]


def test_streams_are_told_only_of_text(monkeypatch):
    monkeypatch.setattr(fakes, "VOCAB", 512)
    opened, pieces = model(), []
    opened.session.script = [*opened.tokenizer.encode("\u00e9"), END]
    answer = opened.query(None, "?", on_token=pieces.append)
    assert "" not in pieces
    assert "".join(pieces) == answer.text
