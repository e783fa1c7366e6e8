"""The shipped pictures with their answers: `python -m vlmedge.demo.gallery DIR` writes them again."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image

from vlmedge.demo.questions import Question, questions
from vlmedge.demo.scene import Scene, draw, scene

SEED = 3_000_003
# Picture by picture: file name -> index in the set SEED and what sizes to draw from.
GALLERY: dict[str, tuple[int, str]] = {
    "shapes": (78, "single"),
    "small": (171, "single"),
    "square": (7, "tiled"),
    "landscape": (16, "tiled"),
    "wide": (25, "tiled"),
    "tall": (6, "tiled"),
}


def gallery_scene(name: str) -> Scene:
    """The content of one shipped picture."""
    index, sizes = GALLERY[name]
    return scene(SEED, index, sizes)


def write_gallery(folder: Path) -> None:
    """Write every picture as PNG, and answers.json (see `vlmedge.demo.demo_answers`)."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for name in GALLERY:
        content = gallery_scene(name)
        Image.fromarray(draw(content)).save(folder / f"{name}.png", optimize=True)
        tasks = [_task(content, q) for q in questions(content) if q.refers is None]
        entries.append({"picture": f"{name}.png", "size": [content.width, content.height], "tasks": tasks})
    (folder / "answers.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def _task(content: Scene, question: Question) -> dict[str, Any]:
    entry: dict[str, Any] = {"kind": question.kind, "skill": question.skill, "text": question.text}
    things = [content.things[i] for i in question.targets]
    if question.skill == "detect":
        boxes = [(t.box.x_min, t.box.y_min, t.box.x_max, t.box.y_max) for t in things]
        return entry | {"boxes": [[round(edge, 4) for edge in box] for box in boxes]}
    if question.skill == "point":
        return entry | {"points": [[round(at, 4) for at in t.box.center] for t in things]}
    return entry | {"answers": list(question.answers)}


def main() -> None:
    """Read the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    write_gallery(parser.parse_args().folder)


if __name__ == "__main__":
    main()
