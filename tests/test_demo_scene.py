"""Made-up pictures: the same every time, unambiguous, and drawn as described."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from vlmedge.demo.scene import BACKGROUNDS, COLORS, KINDS, draw, scene
from vlmedge.imaging import tiling_of
from vlmedge.spec import ImageSpec, OverlapCrops

SPEC = ImageSpec(112, 14, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "lanczos", OverlapCrops(6, 1))
SCENES = [scene(11, i) for i in range(300)]


def test_a_scene_is_a_function_of_seed_and_index():
    again = scene(11, 7)
    assert again == SCENES[7]
    assert np.array_equal(draw(again), draw(SCENES[7]))
    assert scene(12, 7) != SCENES[7]


def test_everything_occurs():
    things = [t for s in SCENES for t in s.things]
    assert {t.kind for t in things} == set(KINDS)
    assert {t.color for t in things} == set(COLORS)
    assert {s.background for s in SCENES} == set(BACKGROUNDS)
    assert {len(s.things) for s in SCENES} == {1, 2, 3, 4, 5}


def test_most_pictures_are_one_crop_and_a_part_several():
    tilings = Counter(tiling_of(s.height, s.width, SPEC) for s in SCENES)
    several = sum(n for tiling, n in tilings.items() if tiling != (1, 1))
    assert 0.12 < several / len(SCENES) < 0.22
    assert {(2, 2), (2, 3), (3, 2), (1, 4)} <= set(tilings)
    assert any(max(s.height, s.width) < 100 for s in SCENES)


def test_a_person_can_tell_places_and_order():
    for s in SCENES:
        centers = [t.box.center for t in s.things]
        assert all(b[0] - a[0] >= 0.07 for a, b in itertools.pairwise(centers))
        for x, y in centers:
            assert min(abs(v - line) for v in (x, y) for line in (1 / 3, 2 / 3)) >= 0.05


@pytest.mark.parametrize("index", [0, 3, 8, 21, 40, 77])
def test_each_shape_is_where_its_box_says_in_its_color(index):
    content = SCENES[index]
    picture = draw(content).astype(int)
    for i, thing in enumerate(content.things):
        others = replace(content, things=content.things[:i] + content.things[i + 1 :])
        box = thing.box
        x, y = int(box.center[0] * content.width), int(box.center[1] * content.height)
        assert np.abs(picture[y, x] - COLORS[thing.color]).max() < 30
        assert thing.holds(x + 0.5, y + 0.5)
        # Colours and noise are drawn in order, so leaving a thing out repaints later ones: look near this one only.
        left, top = int(box.x_min * content.width) - 6, int(box.y_min * content.height) - 6
        near = (
            slice(max(0, top), int(box.y_max * content.height) + 7),
            slice(max(0, left), int(box.x_max * content.width) + 7),
        )
        changed = np.abs(picture - draw(others).astype(int)).max(2)[near] > 40
        rows, columns = np.nonzero(changed)
        assert abs(rows.min() + max(0, top) - box.y_min * content.height) < 2.5
        assert abs(columns.max() + 1 + max(0, left) - box.x_max * content.width) < 2.5


def test_holds_is_false_outside():
    cross = next(t for s in SCENES for t in s.things if t.kind == "cross")
    corner = cross.radius * 0.7
    turned = complex(np.cos(cross.angle), np.sin(cross.angle)) * complex(corner, corner)
    assert not cross.holds(cross.x + turned.real, cross.y + turned.imag)
    assert not cross.holds(cross.x + 2 * cross.radius, cross.y)
