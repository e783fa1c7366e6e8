"""Boxes and points drawn on a picture, with labels that can be read on any background."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from vlmedge.answer import Box, Point
from vlmedge.errors import OutputError
from vlmedge.session import U8

_LINE = (255, 214, 0)
_EDGE = (0, 0, 0)


def draw(picture: U8, boxes: Sequence[Box], points: Sequence[Point], label: str) -> Pillow.Image:
    """Return a copy of the picture with every box and point, numbered.

    Lines are bright with a dark edge on both sides; labels are dark on bright, so either shows on any background.
    """
    image = Pillow.fromarray(picture).copy()
    canvas = ImageDraw.Draw(image)
    width = max(2, round(min(image.size) / 150))
    font = ImageFont.load_default(size=max(12, round(min(image.size) / 30)))
    many = len(boxes) + len(points) > 1
    for number, box in enumerate(boxes, 1):
        corners = _corners(box, image.size)
        canvas.rectangle(corners, outline=_EDGE, width=width + 2)
        inner = (corners[0] + 1, corners[1] + 1, corners[2] - 1, corners[3] - 1)
        if inner[0] < inner[2] and inner[1] < inner[3]:
            canvas.rectangle(inner, outline=_LINE, width=width)
        _tag(canvas, (corners[0], corners[1]), f"{label} {number}" if many else label, font, image.size)
    for number, point in enumerate(points, 1):
        x, y, radius = point.x * image.width, point.y * image.height, 3 * width
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_LINE, outline=_EDGE, width=2)
        _tag(canvas, (x + radius, y - radius), f"{label} {number}" if many else label, font, image.size)
    return image


def save(image: Pillow.Image, path: Path) -> None:
    """Write the picture in the format that the name's ending says; raises OutputError where that fails."""
    try:
        image.save(path)
    except ValueError:
        raise OutputError(f"'{path.suffix}' is no picture format; name the output .png, .jpg or .webp") from None
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from None


def _corners(box: Box, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """In pixels, inside the picture."""
    width, height = size
    x0, x1 = (min(max(v * width, 0), width - 1) for v in (box.x_min, box.x_max))
    y0, y1 = (min(max(v * height, 0), height - 1) for v in (box.y_min, box.y_max))
    return x0, y0, x1, y1


def _tag(
    canvas: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    size: tuple[int, int],
) -> None:
    """A label above the point, moved inside where it would leave the picture."""
    left, top, right, bottom = canvas.textbbox((0, 0), text, font=font)
    wide, high = right - left + 6, bottom - top + 6
    x = min(max(at[0], 0), max(size[0] - wide, 0))
    y = at[1] - high if at[1] >= high else min(at[1], max(size[1] - high, 0))
    canvas.rectangle((x, y, x + wide, y + high), fill=_LINE, outline=_EDGE)
    canvas.text((x + 3 - left, y + 3 - top), text, fill=_EDGE, font=font)
