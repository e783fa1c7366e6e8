"""Boxes and points drawn on a picture, with labels that can be read on any background."""

from __future__ import annotations

import io
import os
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from vlmedge.answer import Box, Point
from vlmedge.errors import OutputError
from vlmedge.session import U8

LINE = (255, 214, 0)
EDGE = (0, 0, 0)
_LONGEST = 32  # characters of a label
_PAD = 3
Corners = tuple[float, float, float, float]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def draw(picture: U8, boxes: Sequence[Box], points: Sequence[Point], label: str) -> Pillow.Image:
    """Return a copy of the picture with every box and point; where there are several, they are numbered.

    Lines are bright with a dark edge on both sides, labels are dark on bright, so either shows on any background.
    What lies outside of the picture is drawn on its border. A picture too small to hold a label gets none.
    """
    image = Pillow.fromarray(picture).copy()
    canvas = ImageDraw.Draw(image)
    width = max(2, round(min(image.size) / 150))
    font = ImageFont.load_default(size=max(12, round(min(image.size) / 30)))
    names = _names(label, len(boxes) + len(points), font)
    for box in boxes:
        _frame(canvas, _corners(box, image.size), width)
    for point in points:
        _dot(canvas, _place(point, image.size), 3 * width, max(1, width // 2))
    places = [_corners(box, image.size)[:2] for box in boxes]
    places += [(x + 3 * width, y - 3 * width) for x, y in (_place(p, image.size) for p in points)]
    for name, place in zip(names, places, strict=True):  # last, so that no line runs through a label
        _tag(canvas, place, name, font, image.size)
    return image


def check_output(path: Path) -> None:
    """Raise OutputError for a name that `save` cannot write, before any work is done."""
    _format(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a file, like {path / 'out.png'}")
    if not path.parent.is_dir():
        raise OutputError(f"there is no folder {path.parent} to write {path.name} into")


def save(image: Pillow.Image, path: Path) -> None:
    """Write the picture in the format that the name's ending says; raises OutputError where that fails."""
    data = io.BytesIO()
    image.save(data, _format(path))
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(data.getbuffer())
        part.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}; choose another place") from None
    finally:
        with suppress(OSError):  # a read-only disk refuses to remove even what is not there
            part.unlink(missing_ok=True)


def _format(path: Path) -> str:
    name = Pillow.registered_extensions().get(path.suffix.lower(), "")
    if name not in ("PNG", "JPEG", "WEBP", "BMP", "TIFF"):
        raise OutputError(f"'{path.suffix}' is no picture format; name the output .png, .jpg or .webp")
    return name


def _names(label: str, count: int, font: Font) -> list[str]:
    """One label each; accents go, text that the font has no letters for is left out, the numbers remain."""
    text = " ".join("".join(c for c in unicodedata.normalize("NFKD", label) if not unicodedata.combining(c)).split())
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
    text = text if _has_letters(font, text) else ""
    return [f"{text} {number}".strip() if count > 1 or not text else text for number in range(1, count + 1)]


def _has_letters(font: Font, text: str) -> bool:
    """Fonts draw one and the same sign for every character that they lack."""
    lacking = bytes(font.getmask("\U0010fffd"))
    return all(c == " " or bytes(font.getmask(c)) != lacking for c in text)


def _corners(box: Box, size: tuple[int, int]) -> Corners:
    """In pixels, inside the picture."""
    x0, y0 = _place(Point(min(box.x_min, box.x_max), min(box.y_min, box.y_max)), size)
    x1, y1 = _place(Point(max(box.x_min, box.x_max), max(box.y_min, box.y_max)), size)
    return x0, y0, x1, y1


def _place(point: Point, size: tuple[int, int]) -> tuple[int, int]:
    """In whole pixels, inside the picture."""
    x, y = (round(min(max(v * n, 0), n - 1)) for v, n in zip((point.x, point.y), size, strict=True))
    return x, y


def _frame(canvas: ImageDraw.ImageDraw, corners: Corners, width: int) -> None:
    """A bright line whose outer border is the box, between two dark ones."""
    x0, y0, x1, y1 = corners
    edge = max(1, width // 2)
    for grow, color, thick in ((edge, EDGE, width + 2 * edge), (0, LINE, width)):
        canvas.rectangle((x0 - grow, y0 - grow, x1 + grow, y1 + grow), outline=color, width=thick)


def _dot(canvas: ImageDraw.ImageDraw, at: tuple[int, int], radius: int, edge: int) -> None:
    (x, y), dark = at, radius + edge
    canvas.ellipse((x - dark, y - dark, x + dark, y + dark), fill=EDGE)
    canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=LINE)


def _tag(canvas: ImageDraw.ImageDraw, at: tuple[float, float], text: str, font: Font, size: tuple[int, int]) -> None:
    """A label above the place, moved inside where it would leave the picture."""
    left, top, right, bottom = (round(v) for v in canvas.textbbox((0, 0), text, font=font))
    wide, high = right - left + 2 * _PAD, bottom - top + 2 * _PAD
    if wide >= size[0] or 3 * high > size[1]:
        return
    x = min(max(at[0], 0), size[0] - wide - 1)
    y = at[1] - high if at[1] >= high else min(max(at[1], 0), size[1] - high - 1)
    canvas.rectangle((x, y, x + wide, y + high), fill=LINE, outline=EDGE)
    canvas.text((x + _PAD - left, y + _PAD - top), text, fill=EDGE, font=font)
