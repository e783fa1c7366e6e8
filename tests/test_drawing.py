"""Boxes, points and labels that can be seen on any background (contrast by the WCAG's formula)."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage import data

from vlmedge.answer import Box, Point
from vlmedge.drawing import EDGE, LINE, check_output, draw, save
from vlmedge.errors import OutputError

BOX = Box(0.25, 0.25, 0.75, 0.75)
NOISE = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)


def luminance(colour: Any) -> Any:
    """https://www.w3.org/TR/WCAG21/#dfn-relative-luminance"""
    v = np.asarray(colour, np.float64) / 255
    linear = np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])


def contrast(a: Any, b: Any) -> Any:
    one, two = luminance(a), luminance(b)
    return (np.maximum(one, two) + 0.05) / (np.minimum(one, two) + 0.05)


def plain(value: int, height: int = 300, width: int = 400) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def backgrounds() -> Iterator[Any]:
    for value in range(0, 256, 15):
        yield plain(value)
    yield NOISE
    yield np.broadcast_to(np.array(LINE, np.uint8), (300, 400, 3))
    yield np.ascontiguousarray(data.coffee()[:300, :400])


def test_labels_stand_out_from_their_plates():
    assert contrast(LINE, EDGE) >= 7


def test_a_line_or_its_edge_stands_out_from_any_background():
    for background in backgrounds():
        best = np.maximum(contrast(background, LINE), contrast(background, EDGE))
        assert best.min() >= 3


@pytest.mark.parametrize("background", list(backgrounds()), ids=range(len(list(backgrounds()))))
def test_every_side_shows_on_what_lies_beside_it(background):
    """Across each side of a drawn box there is the bright line and its dark edge, and one of them differs by 3:1
    from the picture's own pixel there. (In noise a pixel may be like the one drawn on it: nearly all differ.)
    """
    height, width = background.shape[:2]
    drawn = np.array(draw(background, [BOX], [], "x"))
    across = [(slice(150 - 30, 150 + 30), slice(x - 5, x + 6)) for x in (width // 4, width * 3 // 4)]
    across += [(slice(y - 5, y + 6), slice(200 - 40, 200 + 40)) for y in (height // 4, height * 3 // 4)]
    for number, place in enumerate(across):
        axis = 1 if number < 2 else 0
        assert (drawn[place] == LINE).all(axis=2).any(axis=axis).all()
        assert (drawn[place] == EDGE).all(axis=2).any(axis=axis).all()
        strongest = contrast(drawn[place], background[place]).max(axis=axis)
        assert (strongest >= 3).mean() > (0.97 if background is NOISE else 0.999)


@pytest.mark.parametrize(
    "background", [plain(0), plain(255), plain(119), NOISE], ids=["black", "white", "grey", "noise"]
)
def test_labels_are_dark_letters_on_a_bright_plate(background):
    """The label's pixels do not depend on the picture, and hold both colours."""
    with_label = np.array(draw(background, [BOX], [], "cat"))
    without = np.array(draw(background, [BOX], [], "x" * 0))
    where = np.argwhere((with_label == LINE).all(axis=2))
    assert len(where) > len(np.argwhere((without == LINE).all(axis=2)))
    plate = with_label[75 - 18 : 75 - 2, 104:120]
    dark = (luminance(plate) < 0.05).mean()
    bright = (np.abs(plate.astype(int) - LINE).sum(axis=2) < 30).mean()
    assert dark > 0.05
    assert bright > 0.4


@pytest.mark.parametrize(
    "box",
    [
        Box(-0.5, -0.5, 1.5, 1.5),
        Box(-1.0, 0.2, -0.5, 0.4),
        Box(2.0, 2.0, 3.0, 3.0),
        Box(0.5, 0.5, 0.5, 0.5),
        Box(0.7, 0.7, 0.3, 0.3),
        Box(0.999, 0.0, 1.0, 0.001),
    ],
)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (8, 200), (200, 8), (300, 400)])
def test_any_box_on_any_size_leaves_a_mark(box, size):
    drawn = np.array(draw(plain(30, *size), [box], [], "a label"))
    assert drawn.shape == (*size, 3)
    assert (drawn == LINE).all(axis=2).any()


@pytest.mark.parametrize("point", [Point(0.5, 0.5), Point(-1.0, 0.5), Point(1.0, 1.0), Point(5.0, 5.0)])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (300, 400)])
def test_any_point_on_any_size_leaves_a_mark(point, size):
    assert (np.array(draw(plain(30, *size), [], [point], "x")) == LINE).all(axis=2).any()


def test_a_huge_picture_gets_wider_lines():
    thin, wide = (np.array(draw(plain(128, *s), [BOX], [], "x")) for s in ((300, 400), (3000, 4000)))
    count = [int((row == LINE).all(axis=1).sum()) for row in (thin[150], wide[1500])]
    assert count[0] == 4
    assert count[1] >= 40


def test_labels_stay_inside_and_a_picture_too_small_gets_none():
    drawn = np.array(draw(plain(128), [Box(0.95, 0.0, 1.0, 0.05)], [], "a long label here"))
    columns = np.argwhere((drawn[:12] == LINE).all(axis=2))[:, 1]
    assert columns.min() < 330  # moved to the left
    tiny = np.array(draw(plain(128, 20, 20), [BOX], [], "a long label here"))
    assert (tiny == 128).all(axis=2).mean() > 0.3


def test_labels_of_any_script():
    for label in ("naïve café", "猫", "кот", "e\u0301\n\tx", "🙂", "", "x" * 500, "[/bold]"):
        draw(plain(128), [BOX, BOX], [Point(0.5, 0.5)], label)
    plate = [np.array(draw(plain(128), [BOX], [], label)) for label in ("café", "cafe", "猫", "1")]
    assert np.array_equal(plate[0], plate[1])
    assert np.array_equal(plate[2], plate[3])  # no letters for it: its number


def test_the_picture_itself_stays(tmp_path):
    picture = plain(128)
    draw(picture, [BOX], [], "x")
    assert np.array_equal(picture, plain(128))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.PNG"])
def test_saving(tmp_path, name):
    image = draw(plain(128), [BOX], [], "x")
    check_output(tmp_path / name)
    save(image, tmp_path / name)
    save(image, tmp_path / name)
    with Image.open(tmp_path / name) as saved:
        assert saved.size == (400, 300)
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a", "a.txt", "a.pdf", "dir.png", "no/a.png"])
def test_saving_where_it_cannot_be(tmp_path, name):
    (tmp_path / "dir.png").mkdir()
    with pytest.raises(OutputError):
        check_output(tmp_path / name)
    with pytest.raises(OutputError):
        save(draw(plain(128), [], [], "x"), tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["dir.png"]


def test_saving_on_a_read_only_disk(tmp_path, monkeypatch):
    """Such a disk refuses to write, and then to remove what was not written."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OutputError, match=r"a\.png cannot be written: Read-only file system; choose another place$"):
        save(draw(plain(128), [], [], "x"), tmp_path / "a.png")
