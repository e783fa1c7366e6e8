"""Any picture a user hands over -> RGB uint8 [h, w, 3], as the original reads it but for 16-bit grey.

What is lost on the way is fixed and stated in every bundle: EXIF orientation and colour profiles are ignored,
alpha is dropped, an animation gives its first frame. 16 bits of grey become the upper 8; the original's
`convert("RGB")` clips them to 255, which leaves almost nothing of such a picture.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image as Pillow
from PIL import UnidentifiedImageError

from vlmedge.errors import ImageError
from vlmedge.session import U8

PictureLike: TypeAlias = "str | os.PathLike[str] | Pillow.Image | U8"


def load_picture(source: PictureLike) -> U8:
    """Return RGB uint8 [h, w, 3]; raises ImageError with what is wrong."""
    if isinstance(source, np.ndarray):
        return _array(source)
    if isinstance(source, Pillow.Image):
        with _decoding("the picture"):
            return _rgb(source, "the picture")
    with _opened(Path(source)) as image:
        return _rgb(image, str(source))


def check_picture(path: str | os.PathLike[str]) -> None:
    """Raise the ImageError that a look at the file's first bytes can tell; pixels are not decoded."""
    with _opened(Path(path)):
        return


def digest(picture: U8) -> str:
    """A hash of the pixels and their shape."""
    return hashlib.sha256(repr(picture.shape).encode() + picture.tobytes()).hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[Pillow.Image]:
    with _decoding(str(path)):
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise ImageError(f"{path} is {'a folder' if path.is_dir() else 'a device or pipe'}, not a picture")
        try:
            image = Pillow.open(path)
        except UnidentifiedImageError:
            empty = path.stat().st_size == 0
            raise ImageError(f"{path} is {'empty' if empty else 'no picture that Pillow can read'}") from None
        with image:
            yield image


@contextmanager
def _decoding(what: str) -> Iterator[None]:
    """Turn what Pillow raises into one line; what it only warns of (a bomb half as large, odd EXIF) is let pass."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except FileNotFoundError:
        raise ImageError(f"there is no picture {what}") from None
    except PermissionError:
        raise ImageError(f"{what} may not be read (permission denied)") from None
    except Pillow.DecompressionBombError as error:
        raise ImageError(f"{what} is refused as a decompression bomb: {error}") from None
    except (OSError, SyntaxError, ValueError, OverflowError, EOFError) as error:
        raise ImageError(f"{what} cannot be decoded: {error}") from None


def _rgb(image: Pillow.Image, what: str) -> U8:
    if image.width * image.height == 0:
        raise ImageError(f"{what} has no pixels")
    if image.mode.startswith("I;16") or image.mode == "I":
        return _upper_bits(np.asarray(image).astype(np.int64), what)
    if image.mode == "F":
        raise ImageError(f"{what} has floating-point pixels, whose range is not defined; save it with 8 or 16 bits")
    return np.array(image.convert("RGB"))


def _upper_bits(wide: np.ndarray[tuple[int, ...], np.dtype[np.int64]], what: str) -> U8:
    """16-bit grey [h, w] -> RGB; old versions of Pillow open a 16-bit PNG in the mode of 32-bit pictures."""
    if wide.min() < 0 or wide.max() > 0xFFFF:
        raise ImageError(f"{what} has 32-bit pixels, whose range is not defined; save it with 8 or 16 bits")
    return np.repeat((wide >> 8).astype(np.uint8)[:, :, None], 3, axis=2)


def _array(source: U8) -> U8:
    if source.ndim != 3 or source.shape[2] != 3 or source.dtype != np.uint8:
        raise ImageError(f"an array must be uint8 [h, w, 3], not {source.dtype} {list(source.shape)}")
    if source.size == 0:
        raise ImageError("the picture has no pixels")
    return np.ascontiguousarray(source)
