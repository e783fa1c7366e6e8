"""The files that a job names: which they are, and the job with other names for them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vlmedge.device_bench.job import Job
from vlmedge.errors import UsageError
from vlmedge.loading import local_folder


@dataclass(frozen=True, slots=True)
class Stored:
    """One file: where it lies here, its name in a `Parcel`, with forward slashes, and its hash where that is known."""

    path: Path
    name: str
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Parcel:
    """What goes to a host as one: a name as the job has it, a hash of its content, its files, and what holds them all.

    `top`: the folder that the files' names begin with, or the only file's name.
    """

    name: str
    key: str
    top: str
    files: tuple[Stored, ...]


def parcels(job: Job) -> Iterator[Parcel]:
    """Everything of the job that lies here. Raises UsageError for a file that is not there."""
    folder = local_folder(job.variant.source) if job.variant else None
    if job.variant and folder is not None:
        if not folder.is_dir():
            raise UsageError(f"there is no folder {folder}")
        top = Path(os.path.abspath(folder)).name
        yield Parcel(job.variant.source, job.variant.digest, top, tuple(_inside(folder, top)))
    for ask in job.work.asks:
        yield _single(ask.picture, ask.sha256)
    if job.truth:
        yield _single(job.truth)


def renamed(job: Job, names: Mapping[str, str]) -> Job:
    """The job with other names of sources, pictures and truth; those that `names` lacks stay."""
    asks = tuple(replace(ask, picture=names.get(ask.picture, ask.picture)) for ask in job.work.asks)
    variant = job.variant and replace(job.variant, source=names.get(job.variant.source, job.variant.source))
    truth = names.get(job.truth, job.truth)
    return replace(job, work=replace(job.work, asks=asks), variant=variant, truth=truth)


def _single(name: str, sha256: str = "") -> Parcel:
    path = Path(name)
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    key = sha256 or hashlib.sha256(path.read_bytes()).hexdigest()
    return Parcel(name, key, path.name, (Stored(path, path.name, key),))


def _inside(folder: Path, top: str) -> Iterator[Stored]:
    """Every file of a bundle or checkpoint but hidden ones.

    Links to files are followed, as the hub's cache is made of them; links to folders are not, they may go in circles.
    """
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = Path(parent, name)
            yield Stored(path, f"{top}/{path.relative_to(folder).as_posix()}")
