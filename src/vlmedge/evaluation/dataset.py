"""A question set by name: the demo generator's, or a user's file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlmedge.errors import UsageError
from vlmedge.evaluation.jsonl import read_jsonl
from vlmedge.evaluation.question import Picture
from vlmedge.evaluation.shapes import demo_digest, demo_pictures
from vlmedge.progress import Progress

DEMO = "demo"
DEMO_PICTURES = 100


@dataclass(frozen=True, slots=True)
class Dataset:
    """The pictures that are asked about.

    `digest` is the whole set's, its pictures' files included, however many of them are taken.
    """

    name: str
    digest: str
    pictures: tuple[Picture, ...]

    @property
    def questions(self) -> int:
        """How many questions there are."""
        return sum(len(picture.questions) for picture in self.pictures)


def open_dataset(data: str, pictures: int | None = None, progress: Progress | None = None) -> Dataset:
    """The set `data`: "demo" (100 pictures unless `pictures` says otherwise), or a JSONL file (all, or its first).

    Every picture of a file is read for the digest; a process reads one again only where its size or time has changed.
    Raises UsageError for a file that cannot be read as one, and for more pictures than it has.
    """
    if pictures is not None and pictures < 1:
        raise UsageError(f"an evaluation takes at least 1 picture, not {pictures}")
    if data == DEMO:
        return Dataset(DEMO, demo_digest(), demo_pictures(pictures or DEMO_PICTURES))
    digest, found = read_jsonl(Path(data), progress)
    if pictures is not None and pictures > len(found):
        raise UsageError(f"{data} has {len(found)} pictures, not {pictures}")
    return Dataset(data, digest, found[:pictures])
