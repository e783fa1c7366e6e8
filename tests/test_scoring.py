"""Scores against values worked out by hand from the published definitions."""

from functools import cache
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmedge.answer import Box
from vlmedge.scoring import BOX_HIT, anls, exact, iou, levenshtein, match_boxes, match_points, near, normalised, vqa


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


def test_boxes_are_used_once():
    left, right = Box(0.0, 0.0, 0.4, 1.0), Box(0.6, 0.0, 1.0, 1.0)
    assert match_boxes([left, right], [right, left]) == (2, 2.0)
    assert match_boxes([left, left], [left]) == (1, 1.0)
    assert match_boxes([left, right], []) == (0, 0.0)
    assert match_boxes([], [left]) == (0, 0.0)
    hits, overlap = match_boxes([left], [Box(0.2, 0.0, 0.6, 1.0)])  # a third: it counts as overlap, not as a hit
    assert hits == 0
    assert overlap == pytest.approx(1 / 3)


def test_one_box_over_everything_counts_once():
    things = [Box(0.0, 0.0, 0.3, 1.0), Box(0.3, 0.0, 0.6, 1.0), Box(0.6, 0.0, 1.0, 1.0)]
    assert match_boxes(things, [Box(0.0, 0.0, 1.0, 1.0)]) == (0, pytest.approx(0.4))


def test_hits_come_before_overlap():
    """The equal pair would leave the others an overlap of 0.46: more in sum, but one hit in place of two."""
    one, two, small = (Box(left, 0.0, right, 1.0) for left, right in ((0.0, 0.5), (0.15, 0.65), (0.12, 0.395)))
    assert match_boxes([one, two], [one, small]) == (2, pytest.approx(7 / 13 + 0.55))


edges = st.integers(0, 4).map(lambda n: n / 5)
some_boxes = st.lists(
    st.tuples(edges, edges, st.integers(1, 3), st.integers(1, 3)).map(
        lambda b: Box(b[0], b[1], b[0] + b[2] / 5, b[1] + b[3] / 5)
    ),
    max_size=4,
)


@given(some_boxes, some_boxes)
def test_boxes_are_matched_as_well_as_can_be(wanted, found):
    """Against every way to pair them; the order of neither side matters."""
    longer, shorter = sorted((wanted, found), key=len, reverse=True)
    ways = [[iou(a, b) for a, b in zip(chosen, shorter, strict=True)] for chosen in permutations(longer, len(shorter))]
    best = max((sum(share >= BOX_HIT for share in way), sum(way)) for way in ways)
    for one, two in ((wanted, found), (wanted[::-1], found), (found, wanted)):
        hits, overlap = match_boxes(one, two)
        assert (hits, overlap) == (best[0], pytest.approx(best[1]))


def test_points_are_used_once():
    def inside(a, b):
        return a < 0.5

    assert match_points([inside, inside], [(0.1, 0.1)]) == 1
    assert match_points([inside, inside], [(0.9, 0.1), (0.1, 0.1), (0.2, 0.1)]) == 2
    assert match_points([], [(0.1, 0.1)]) == 0
    assert match_points([inside], []) == 0


def test_points_in_things_that_overlap_count_in_any_order():
    def wide(a, b):
        return a < 0.6

    def narrow(a, b):
        return a < 0.3

    for things in permutations((wide, narrow)):
        for points in permutations(((0.1, 0.5), (0.5, 0.5))):
            assert match_points(things, points) == 2


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), max_size=5))
def test_as_many_points_count_as_can(held):
    """Against every way to give the points away."""
    things = [lambda x, y, row=row: row[int(x)] for row in held]
    points = [(float(i), 0.0) for i in range(4)]
    rows = held + [[False] * 4] * 4  # a point may be nobody's
    most = max(sum(row[i] for i, row in enumerate(way)) for way in permutations(rows, 4))
    assert match_points(things, points) == most


def test_near_is_a_circle_in_pixels():
    wide = near(0.5, 0.5, 1000, 200)  # 5 % of the longer side: 50 pixels
    assert wide(0.549, 0.5)
    assert not wide(0.551, 0.5)
    assert wide(0.5, 0.74)
    assert not wide(0.5, 0.76)
