"""A bundle: a folder with model files and `vlmedge.json`, written so that it is whole or absent."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vlmedge.errors import BundleError, OutputError
from vlmedge.records import decode, encode
from vlmedge.spec import ModelSpec

SCHEMA = "vlmedge.bundle/1"
MANIFEST = "vlmedge.json"
CHUNK = 8 << 20


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file: what it is for, its size, its SHA-256, and one per chunk of 8 MiB so that a download can resume."""

    path: str
    role: str
    bytes: int
    sha256: str
    chunks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SourceEntry:
    """The checkpoint: hub repository, revision and commit (empty for a folder), and its files' hashes."""

    label: str
    repo: str
    revision: str
    commit: str
    files: dict[str, str]


@dataclass(frozen=True, slots=True)
class ProfileEntry:
    """The quantization profile, a digest of its rules, and what came of it over all weights."""

    name: str
    digest: str
    parameters: int
    bits_per_weight: float
    kv_cache: Literal["f32", "f16"]


@dataclass(frozen=True, slots=True)
class ComponentEntry:
    """One component: its files, its parameters, the storage types that hold them, and its bytes.

    `parameters` counts stored weights, padding included; `types` maps a storage type to its share of them.
    """

    name: str
    files: tuple[str, ...]
    parameters: int
    bytes: int
    bits_per_weight: float
    types: dict[str, int]


@dataclass(frozen=True, slots=True)
class MemoryEntry:
    """Bytes that a runtime needs: weights by component, one KV position, the whole context's KV cache."""

    weights: dict[str, int]
    kv_per_position: int
    kv_context: int


@dataclass(frozen=True, slots=True)
class TokenizerEntry:
    """The tokenizer's file, its pre-tokenizer by name, and how many ids it knows."""

    file: str
    pre_tokenizer: str
    ids: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of `vlmedge.json`."""

    schema: str
    producer: dict[str, str]
    model: ModelSpec
    format: str
    source: SourceEntry
    licence: str
    profile: ProfileEntry
    components: tuple[ComponentEntry, ...]
    files: tuple[FileEntry, ...]
    image: dict[str, Any]
    prompt: dict[str, Any]
    tokenizer: TokenizerEntry
    skills: tuple[str, ...]
    requires: dict[str, str]
    memory: MemoryEntry
    stock: tuple[str, ...]
    verification: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle."""

    path: Path
    manifest: Manifest = field(repr=False)

    @property
    def bytes(self) -> int:
        """Size of all files, the manifest included."""
        return sum(f.bytes for f in self.manifest.files) + (self.path / MANIFEST).stat().st_size

    def check(self) -> None:
        """Compare every file with its hash; raises BundleError for the first that differs."""
        for entry in self.manifest.files:
            found = file_entry(self.path, entry.path, entry.role)
            for number, (wanted, got) in enumerate(zip(entry.chunks, found.chunks, strict=False)):
                if wanted != got:
                    raise BundleError(
                        f"{self.path / entry.path} is damaged in chunk {number} of {CHUNK >> 20} MiB; copy it again"
                    )
            if found != entry:
                raise BundleError(f"{self.path / entry.path} is not what the manifest describes; copy it again")


def is_bundle(path: Path) -> bool:
    """Does the folder hold a manifest?"""
    return (path / MANIFEST).is_file()


def open_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Open a bundle: the manifest is read and every file's presence and size are checked (hashes: `Bundle.check`)."""
    folder = Path(path)
    try:
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise BundleError(f"{folder / MANIFEST} is damaged: {error}") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else None
        raise BundleError(f"{folder} has the schema {found!r}, this version reads {SCHEMA!r}; export it again")
    manifest = decode(Manifest, data, MANIFEST, BundleError)
    for entry in manifest.files:
        file = folder / entry.path
        if Path(entry.path).is_absolute() or ".." in Path(entry.path).parts:
            raise BundleError(f"the manifest names {entry.path!r}, which is outside the bundle")
        if not file.is_file():
            raise BundleError(f"{folder} lacks {entry.path}; copy the bundle again")
        if file.stat().st_size != entry.bytes:
            raise BundleError(f"{file} has {file.stat().st_size} bytes instead of {entry.bytes}; copy it again")
    return Bundle(folder, manifest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `vlmedge.json`, the last file of a bundle."""
    data = json.dumps(encode(manifest), indent=1, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(data, encoding="utf-8")


def file_entry(folder: Path, name: str, role: str) -> FileEntry:
    """Hash a file of the bundle, whole and by chunks."""
    whole, chunks, size = hashlib.sha256(), [], 0
    with (folder / name).open("rb") as file:
        while block := file.read(CHUNK):
            whole.update(block)
            chunks.append(hashlib.sha256(block).hexdigest())
            size += len(block)
    return FileEntry(name, role, size, whole.hexdigest(), tuple(chunks))


@contextmanager
def staged(out: Path, needed: int) -> Iterator[Path]:
    """A hidden sibling folder that becomes `out` when the block ends well, and vanishes when it does not.

    Raises OutputError where `out` exists, its parent cannot be written, or the disk has less than `needed` bytes.
    """
    if out.exists() or out.is_symlink():
        raise OutputError(f"{out} exists; remove it or choose another --out")
    part = out.parent / f".{out.name}.partial"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)  # what a killed export left behind
        part.mkdir()
        free = shutil.disk_usage(part).free
        if free < needed:
            raise OutputError(f"{out.parent} has {free / 1e6:,.0f} MB free, the export needs {needed / 1e6:,.0f} MB")
        yield part
        for file in sorted(part.rglob("*")):
            _sync(file)
        part.rename(out)
        _sync(out.parent)
    except OSError as error:
        raise _output_error(out, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _output_error(out: Path, error: OSError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"the disk of {out.parent} is full; free some space or choose another --out")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(f"{out.parent} cannot be written: {os.strerror(error.errno)}; choose another --out")
    return OutputError(f"{out} cannot be written: {error}")


def _sync(path: Path) -> None:
    """Flush a file or folder to disk, so that the rename never outlives the data."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
