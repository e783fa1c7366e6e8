"""Any picture a user hands over -> RGB uint8 [h, w, 3], as the original reads it.

What is lost on the way is fixed and stated in every bundle: EXIF orientation and colour profiles are ignored,
alpha is dropped, an animation gives its first frame, 16 bits become the upper 8.
"""

from __future__ import annotations

import hashlib
import os
import warnings
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
        return _rgb(source, "the picture")
    path = Path(source)
    try:
        with warnings.catch_warnings():
            # Pillow warns from 89 megapixels on and refuses from twice that; between the two a picture is fine.
            warnings.simplefilter("ignore", Pillow.DecompressionBombWarning)
            with Pillow.open(path) as image:
                return _rgb(image, str(path))
    except FileNotFoundError:
        raise ImageError(f"there is no picture {path}") from None
    except IsADirectoryError:
        raise ImageError(f"{path} is a folder, not a picture") from None
    except PermissionError:
        raise ImageError(f"{path} may not be read (permission denied)") from None
    except Pillow.DecompressionBombError as error:
        raise ImageError(f"{path} is refused as a decompression bomb: {error}") from None
    except UnidentifiedImageError:
        empty = path.stat().st_size == 0
        raise ImageError(f"{path} is {'empty' if empty else 'no picture that Pillow can read'}") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"{path} cannot be decoded: {error}") from None


def digest(picture: U8) -> str:
    """A hash of the pixels and their shape."""
    return hashlib.sha256(repr(picture.shape).encode() + picture.tobytes()).hexdigest()


def _rgb(image: Pillow.Image, what: str) -> U8:
    if image.width * image.height == 0:
        raise ImageError(f"{what} has no pixels")
    if image.mode.startswith("I;16") or image.mode == "I":
        wide = np.asarray(image).astype(np.int64)
        narrow = np.clip(wide >> 8, 0, 255).astype(np.uint8)
        return np.ascontiguousarray(np.repeat(narrow[:, :, None], 3, axis=2))
    if image.mode == "F":
        raise ImageError(f"{what} has floating-point pixels, whose range is not defined; save it with 8 or 16 bits")
    return np.array(image.convert("RGB"))


def _array(source: U8) -> U8:
    if source.ndim != 3 or source.shape[2] != 3 or source.dtype != np.uint8:
        raise ImageError(f"an array must be uint8 [h, w, 3], not {source.dtype} {list(source.shape)}")
    if source.size == 0:
        raise ImageError("the picture has no pixels")
    return np.ascontiguousarray(source)
