"""Averaged gaze: draws, mirror image, outliers."""

import numpy as np
import pytest

from vlmedge.answer import Answer, Point
from vlmedge.skills.gaze import DRAWS, steady_gaze, without_outliers

PICTURE = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3)
FACE = (0.2, 0.3, 0.4, 0.6)


def test_draws_lie_in_the_face_and_in_its_mirror():
    asked = []

    def ask(pixels, eye):
        asked.append((np.array_equal(pixels, PICTURE), eye))
        return Answer("gaze", points=(Point(0.9 if np.array_equal(pixels, PICTURE) else 0.1, 0.5),))

    _, (point,) = steady_gaze(ask, PICTURE, FACE, 0)
    assert (point.x, point.y) == pytest.approx((0.9, 0.5))
    assert [straight for straight, _ in asked] == [True] * DRAWS + [False] * DRAWS
    for straight, (x, y) in asked:
        assert 0.2 <= (x if straight else 1 - x) <= 0.4
        assert 0.3 <= y <= 0.6


def test_too_few_targets_are_none():
    answers = iter([Answer("gaze", points=(Point(0.5, 0.5),))] * (DRAWS - 1) + [Answer("gaze")] * (DRAWS + 1))
    assert steady_gaze(lambda *_: next(answers), PICTURE, FACE, 0)[1] == ()


def test_outliers_go():
    near = [(0.5 + d, 0.5) for d in (0.0, 0.01, 0.02, 0.03)]
    assert without_outliers([*near, (0.9, 0.9)]) == near


def test_equal_points_stay():
    assert without_outliers([(0.1, 0.2)] * 5) == [(0.1, 0.2)] * 5
