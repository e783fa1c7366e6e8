"""What is evaluated: a bundle or a checkpoint, its name in the tables, its size and its fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from vlmedge.bundle import CHUNK, MANIFEST, open_bundle
from vlmedge.errors import CheckpointError
from vlmedge.loading import Described, describe, names_bundle
from vlmedge.pickles import INDEX as PICKLE_INDEX
from vlmedge.progress import Progress
from vlmedge.selection import SMALL
from vlmedge.tensorfile import INDEX


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to ask.

    `digest` tells it from every other, `bytes` is the size of its files; `format` and `profile` are a bundle's, a
    checkpoint's are "checkpoint" and "".
    """

    source: str
    label: str
    digest: str
    bytes: int
    format: str
    profile: str

    @property
    def is_bundle(self) -> bool:
        """Is it an export?"""
        return self.format != "checkpoint"


def examine(source: str, label: str, *, allow_pickle: bool = False, progress: Progress | None = None) -> Subject:
    """Look at a model without opening it. Raises what `open_bundle`, `Bundle.check` and `describe` raise."""
    if names_bundle(source):
        bundle = open_bundle(Path(source))
        manifest = bundle.manifest
        digest = fingerprint(source)
        return Subject(source, label, digest, bundle.bytes, manifest.format, manifest.profile.name)
    found = describe(source, allow_pickle=allow_pickle, progress=progress)
    size = sum(file.stat().st_size for file in found.checkpoint.files)
    return Subject(source, label, _checkpoint(found), size, "checkpoint", "")


def fingerprint(source: str, *, allow_pickle: bool = False) -> str:
    """A hash of all that the answers depend on.

    A bundle's is its manifest's, after every file was compared with it (BundleError where one is damaged); a
    checkpoint's is that of its weights, of every small file that is downloaded with them (`selection.SMALL`: configs,
    tokenizer files, code) and of the tokenizer that is used, which may come from elsewhere. All bytes are read.
    """
    if names_bundle(source):
        bundle = open_bundle(Path(source))
        bundle.check()
        return _hash([bundle.path / MANIFEST])
    return _checkpoint(describe(source, allow_pickle=allow_pickle))


def _checkpoint(found: Described) -> str:
    try:
        return _hash([*_small(found.checkpoint.folder), *found.checkpoint.files], found.tokenizer)
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from None


def _small(folder: Path) -> list[Path]:
    """The files beside the weights that can decide an answer."""
    patterns = (*SMALL, INDEX, PICKLE_INDEX)
    return sorted(p for p in folder.iterdir() if p.is_file() and any(fnmatch(p.name, known) for known in patterns))


def _hash(files: Iterable[Path], first: bytes = b"") -> str:
    digest = hashlib.sha256(first)
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(CHUNK):
                digest.update(block)
    return digest.hexdigest()
