"""Scores against values worked out by hand from the published definitions."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmedge.answer import Box
from vlmedge.scoring import anls, exact, iou, levenshtein, match_boxes, match_points, near, normalised, vqa


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("A Cat.", "cat"),
        ("the  two dogs", "2 dogs"),
        ("none", "0"),
        ("100,978", "100978"),  # the four examples are visualqa.org's own
        ("dont", "don't"),
        ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        ("red/green", "red green"),
        ("couldnt've, can\u2019t", "couldn't've can't"),
        ("", ""),
        ("the", ""),
    ],
)
def test_texts_are_compared_as_vqa_says(text, plain):
    assert normalised(text) == plain


# Of ten people so many said it: min(n / 3, 1) averaged over the ten sets of nine, as https://visualqa.org has it.
@pytest.mark.parametrize(("people", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_the_soft_score_of_ten_people(people, score):
    assert vqa("Yes.", ["yes"] * people + ["no"] * (10 - people)) == pytest.approx(score)


def test_fewer_answers_are_all_accepted():
    assert vqa("two", ["2", "a pair"]) == 1
    assert vqa("three", ["2", "a pair"]) == 0
    assert vqa("a pair", ["pair"] * 9) == 1


def test_exact_is_exact_but_for_case_and_the_ends():
    assert exact(" Red ", ["red"])
    assert exact("STRASSE", ["straße"])
    assert not exact("a red", ["red"])
    assert not exact("red.", ["red"])
    assert not exact("", ["red"])


@pytest.mark.parametrize(
    ("text", "answers", "score"),
    [
        ("kitten", ["kitten"], 1.0),
        ("sitting", ["kitten"], 1 - 3 / 7),
        ("abcd", ["abxy"], 0.0),  # a distance of 2 over 4 is the threshold, which scores 0
        ("abcde", ["abcxy"], 1 - 2 / 5),
        ("ABC", ["abc"], 1.0),
        ("a  b", [" a b "], 1.0),
        ("sitting", ["a", "kitten", "sittin"], 1 - 1 / 7),  # the nearest answer counts
        ("", ["x"], 0.0),
        ("", [""], 1.0),
        ("x", [], 0.0),
    ],
)
def test_anls(text, answers, score):
    assert anls(text, answers) == pytest.approx(score)


@given(st.text("abc", max_size=7), st.text("abc", max_size=7))
def test_the_distance_is_that_of_its_definition(one, two):
    @cache
    def away(i, j):
        if not i or not j:
            return i + j
        return min(away(i - 1, j) + 1, away(i, j - 1) + 1, away(i - 1, j - 1) + (one[i - 1] != two[j - 1]))

    assert levenshtein(one, two) == away(len(one), len(two))


def test_overlap_of_boxes():
    one = Box(0.0, 0.0, 0.5, 0.5)
    assert iou(one, one) == 1
    assert iou(one, Box(0.25, 0.0, 0.75, 0.5)) == pytest.approx(1 / 3)
    assert iou(one, Box(0.5, 0.0, 1.0, 0.5)) == 0
    assert iou(one, Box(0.3, 0.3, 0.3, 0.3)) == 0  # no area


def test_boxes_are_taken_in_turn_and_used_once():
    left, right = Box(0.0, 0.0, 0.4, 1.0), Box(0.6, 0.0, 1.0, 1.0)
    assert match_boxes([left, right], [right, left]) == (2, 2.0)
    assert match_boxes([left, left], [left]) == (1, 1.0)
    assert match_boxes([left, right], []) == (0, 0.0)
    assert match_boxes([], [left]) == (0, 0.0)
    hits, overlap = match_boxes([left], [Box(0.2, 0.0, 0.6, 1.0)])  # a third: it counts as overlap, not as a hit
    assert hits == 0
    assert overlap == pytest.approx(1 / 3)


def test_points_are_used_once():
    def inside(a, b):
        return a < 0.5

    assert match_points([inside, inside], [(0.1, 0.1)]) == 1
    assert match_points([inside, inside], [(0.9, 0.1), (0.1, 0.1), (0.2, 0.1)]) == 2
    assert match_points([], [(0.1, 0.1)]) == 0


def test_near_is_a_circle_in_pixels():
    wide = near(0.5, 0.5, 1000, 200)  # 5 % of the longer side: 50 pixels
    assert wide(0.549, 0.5)
    assert not wide(0.551, 0.5)
    assert wide(0.5, 0.74)
    assert not wide(0.5, 0.76)
