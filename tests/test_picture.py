"""Pictures of every kind: the original's own pixels, or one clear line."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from skimage import data

from vlmedge.errors import ImageError
from vlmedge.parity.pictures import pattern
from vlmedge.picture import check_picture, digest, load_picture

PICTURE = pattern(37, 53)
PHOTOS = sorted(p for p in Path(data.__file__).parent.iterdir() if p.suffix in (".png", ".jpg", ".gif"))


def upstream(source) -> np.ndarray:
    """What moondream's own code sees."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.array(Image.open(source).convert("RGB"))


def saved(path: Path, mode: str, **options) -> Path:
    Image.fromarray(PICTURE).convert(mode).save(path, **options)
    return path


@pytest.mark.parametrize("path", PHOTOS, ids=lambda p: p.name)
def test_photographs_are_upstreams(path):
    assert np.array_equal(load_picture(path), upstream(path))


def test_photographs_are_there():
    assert {"astronaut.png", "rocket.jpg", "coffee.png"} <= {p.name for p in PHOTOS}


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("a.png", "1"),
        ("a.png", "L"),
        ("a.png", "LA"),
        ("a.png", "P"),
        ("a.png", "RGB"),
        ("a.png", "RGBA"),
        ("a.jpg", "CMYK"),
        ("a.jpg", "L"),
        ("a.tif", "CMYK"),
        ("a.tif", "YCbCr"),
        ("a.bmp", "RGB"),
        ("a.webp", "RGBA"),
        ("a.gif", "P"),
    ],
)
def test_modes_are_upstreams(tmp_path, name, mode):
    path = saved(tmp_path / name, mode)
    assert np.array_equal(load_picture(path), upstream(path))


def test_alpha_is_dropped_not_blended(tmp_path):
    image = Image.fromarray(PICTURE).convert("RGBA")
    image.putalpha(Image.fromarray(pattern(37, 53)[:, :, 1]))
    image.save(tmp_path / "a.png")
    assert np.array_equal(load_picture(tmp_path / "a.png"), PICTURE)


def test_palette_with_transparency(tmp_path):
    image = Image.fromarray(PICTURE).quantize(16)
    image.save(tmp_path / "a.png", transparency=bytes(range(0, 256, 16)))
    assert np.array_equal(load_picture(tmp_path / "a.png"), np.array(image.convert("RGB")))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_grey_gives_its_upper_bits(tmp_path, suffix):
    wide = np.arange(60 * 70, dtype=np.uint16).reshape(60, 70) * 15
    Image.fromarray(wide).save(tmp_path / f"a{suffix}")
    assert np.array_equal(load_picture(tmp_path / f"a{suffix}"), np.repeat((wide >> 8)[:, :, None], 3, axis=2))


def test_sixteen_bit_mode_of_old_pillow():
    wide = np.arange(60 * 70, dtype=np.int32).reshape(60, 70) * 15
    assert np.array_equal(load_picture(Image.fromarray(wide))[:, :, 0], wide >> 8)
    with pytest.raises(ImageError, match="32-bit pixels"):
        load_picture(Image.fromarray(wide * 2))


def png(width: int, height: int, depth: int, kind: int, rows: bytes) -> bytes:
    """A PNG made by hand: Pillow writes no 16-bit colour."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(("kind", "channels"), [(2, 3), (6, 4)], ids=["rgb", "rgba"])
def test_sixteen_bit_colour_gives_its_upper_bits(tmp_path, kind, channels):
    wide = (np.arange(20 * 30 * channels) * 977 % 65536).astype(">u2").reshape(20, 30 * channels)
    rows = b"".join(b"\0" + row.tobytes() for row in wide)
    (tmp_path / "a.png").write_bytes(png(30, 20, 16, kind, rows))
    expected = (wide >> 8).astype(np.uint8).reshape(20, 30, channels)[:, :, :3]
    assert np.array_equal(load_picture(tmp_path / "a.png"), expected)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_an_animation_gives_its_first_frame(tmp_path, suffix):
    frames = [Image.fromarray(np.full((20, 30, 3), value, np.uint8)) for value in (250, 10, 120)]
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:], duration=50)
    assert load_picture(tmp_path / f"a{suffix}").min() > 240


def test_exif_rotation_is_ignored(tmp_path):
    image = Image.fromarray(PICTURE)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(load_picture(tmp_path / "a.png"), PICTURE)


def test_a_colour_profile_is_ignored(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    saved(tmp_path / "a.png", "RGB", icc_profile=profile)
    assert np.array_equal(load_picture(tmp_path / "a.png"), PICTURE)


def test_one_pixel(tmp_path):
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "a.png")
    assert load_picture(tmp_path / "a.png").tolist() == [[[1, 2, 3]]]


def bad_files(folder: Path) -> dict[str, str]:
    """File names -> what their refusal says."""
    for name, mode in (("cut.jpg", "RGB"), ("cut.png", "RGB"), ("cut.gif", "P"), ("cut.tif", "RGB")):
        data = saved(folder / name, mode).read_bytes()
        (folder / name).write_bytes(data[: len(data) * 2 // 3])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("this is no picture")
    (folder / "bomb.png").write_bytes(png(60000, 60000, 8, 2, b"\0" * 1000))
    (folder / "zero.png").write_bytes(png(0, 10, 8, 2, b""))
    Image.fromarray(np.ones((4, 4), np.float32)).save(folder / "float.tif")
    (folder / "dir.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    return {
        "cut.jpg": "cannot be decoded",
        "cut.png": "cannot be decoded",
        "cut.gif": "cannot be decoded",
        "cut.tif": "cannot be decoded",
        "empty.png": "is empty",
        "text.png": "is no picture that Pillow can read",
        "bomb.png": "decompression bomb",
        "zero.png": "",
        "float.tif": "floating-point",
        "dir.png": "is a folder",
        "pipe.png": "is a device or pipe",
        "nothing.png": "there is no picture",
    }


def test_bad_files_give_one_clear_line(tmp_path):
    for name, says in bad_files(tmp_path).items():
        with pytest.raises(ImageError) as error:
            load_picture(tmp_path / name)
        assert says in str(error.value), name
        assert str(tmp_path / name) in str(error.value), name
        assert "\n" not in str(error.value), name


def test_bad_files_through_the_command_line(tmp_path, bundle, refused):
    for name, says in bad_files(tmp_path).items():
        assert says in refused("run", bundle, tmp_path / name, "What?"), name


def test_a_look_tells_what_needs_no_pixels(tmp_path):
    bad_files(tmp_path)
    check_picture(saved(tmp_path / "a.png", "RGB"))
    for name in ("empty.png", "text.png", "bomb.png", "dir.png", "pipe.png", "nothing.png"):
        with pytest.raises(ImageError):
            check_picture(tmp_path / name)


def test_half_a_bomb_is_fine(monkeypatch, tmp_path):
    """Pillow warns from MAX_IMAGE_PIXELS on and refuses from twice that."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 37 * 53 * 2 // 3)
    assert load_picture(saved(tmp_path / "a.png", "RGB")).shape == (37, 53, 3)


def test_pictures_in_memory():
    assert np.array_equal(load_picture(Image.fromarray(PICTURE)), PICTURE)
    turned = load_picture(PICTURE[::-1, ::2])
    assert turned.flags.c_contiguous
    assert np.array_equal(turned, PICTURE[::-1, ::2])
    lazy = Image.open(io.BytesIO(png(30, 20, 8, 2, b"\0" * 100)))
    with pytest.raises(ImageError, match="the picture cannot be decoded"):
        load_picture(lazy)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((4, 4), np.uint8), "not uint8 [4, 4]"),
        (np.zeros((4, 4, 4), np.uint8), "not uint8 [4, 4, 4]"),
        (np.zeros((3, 4, 4), np.uint8), "not uint8 [3, 4, 4]"),
        (np.zeros((4, 4, 3), np.float32), "not float32 [4, 4, 3]"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
    ],
)
def test_arrays_of_another_kind(array, says):
    with pytest.raises(ImageError) as error:
        load_picture(array)
    assert says in str(error.value)


def test_digest_tells_shapes_apart():
    assert digest(np.zeros((2, 6, 3), np.uint8)) != digest(np.zeros((6, 2, 3), np.uint8))
