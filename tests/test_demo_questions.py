"""Questions have one answer that follows from the scene, found here by other code than the generator's."""

import re
from collections import Counter

import pytest

from vlmedge.demo.questions import LENGTHS, NUMBERS, questions
from vlmedge.demo.scene import COLORS, KINDS, scene

SCENES = [scene(21, i) for i in range(200)]


def fits(thing, phrase):
    return all(word in (thing.color, thing.kind, "shape") for word in phrase.split())


def singular(word):
    return word.removesuffix("es") if word == "crosses" else word.removesuffix("s")


@pytest.mark.parametrize("content", SCENES[::4], ids=lambda s: str(s.index))
def test_answers_follow_from_the_scene(content):
    for q in questions(content):
        words = q.text.rstrip("?").split()
        if q.kind.startswith("count"):
            phrase = " ".join(
                singular(w) if w not in COLORS else w for w in words[2 : words.index("are" if "are" in words else "do")]
            )
            count = sum(fits(t, phrase) for t in content.things)
            assert q.answers[0] == str(count)
        elif q.kind == "exist":
            assert q.answers == ("yes" if any(fits(t, " ".join(words[3:])) for t in content.things) else "no",)
        elif q.kind == "color":
            assert [t.color for t in content.things if t.kind == words[-1]] == [q.answers[0]]
        elif q.kind == "shape":
            assert [t.kind for t in content.things if t.color == words[-1]] == [q.answers[0]]
        elif q.kind == "where":
            (thing,) = (t for t in content.things if fits(t, " ".join(words[3:])))
            x, y = thing.box.center
            assert ("left" in q.answers[0]) == (x < 1 / 3)
            assert ("right" in q.answers[0]) == (x > 2 / 3)
            assert ("top" in q.answers[0]) == (y < 1 / 3)
            assert ("bottom" in q.answers[0]) == (y > 2 / 3)
        elif q.skill in ("detect", "point"):
            assert q.targets == tuple(i for i, t in enumerate(content.things) if fits(t, q.text))
        elif q.kind == "refer":
            assert q.refers is not None
            assert q.answers[0] == f"a {content.things[q.refers[1]].name}"


def test_captions_name_everything_from_left_to_right():
    for content in SCENES:
        by_length = {q.text: q.answers[0] for q in questions(content) if q.skill == "caption"}
        assert tuple(by_length) == LENGTHS
        names = [t.name for t in sorted(content.things, key=lambda t: t.box.center[0])]
        assert by_length["short"].startswith(NUMBERS[len(names)])
        for length in ("normal", "long"):
            said = re.findall(f"({'|'.join(COLORS)}) ({'|'.join(KINDS)})", by_length[length])
            assert [" ".join(pair) for pair in said] == names


def test_every_kind_is_asked_and_yes_and_no_are_balanced():
    asked = [q for s in SCENES for q in questions(s)]
    kinds = Counter(q.kind for q in asked)
    assert set(kinds) == {
        "count/all", "count/color", "count/kind", "color", "shape", "where", "exist", "refer",
        "caption/short", "caption/normal", "caption/long", "detect", "point",
    }  # fmt: skip
    said = Counter(q.answers[0] for q in asked if q.kind == "exist")
    assert 0.4 < said["yes"] / said.total() < 0.6
    assert {len(q.targets) for q in asked if q.skill == "detect"} >= {0, 1, 2, 3, 4, 5}
    assert questions(SCENES[0]) == questions(scene(21, 0))
