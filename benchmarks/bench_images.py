"""Draw the benchmark's pictures again: `python benchmarks/bench_images.py device_bench/images`.

Scenes of the demo's shapes at the sizes of photographs, softened and with a sensor's noise, so that a JPEG of them
takes about as many bytes, and as long to decode, as one of a photograph. And three of the demo's own pictures.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from vlmedge.demo import attention
from vlmedge.demo.scene import draw, scene

SEED = 6_000_006
SIZES = {"square": (378, 378), "landscape": (640, 480), "portrait": (480, 640), "large": (1024, 768)}
DEMO = ("shapes", "wide", "tall")


def photograph(index: int, width: int, height: int) -> Image.Image:
    """A scene as a camera would show it; a pure function of its arguments."""
    picture = Image.fromarray(draw(scene(SEED, index, "tiled"))).resize((width, height), Image.Resampling.LANCZOS)
    soft = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.8)), np.float32)
    noise = np.random.default_rng((SEED, index)).normal(0, 6, soft.shape)
    return Image.fromarray(np.clip(soft + noise, 0, 255).astype(np.uint8))


def main() -> None:
    """Read the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for index, (name, (width, height)) in enumerate(SIZES.items()):
        photograph(index, width, height).save(folder / f"{name}-{width}x{height}.jpg", quality=85)
    for name in DEMO:
        shutil.copyfile(Path(attention.__file__).parent / "pictures" / f"{name}.png", folder / f"demo-{name}.png")


if __name__ == "__main__":
    main()
