"""A bundle: a folder with model files and `vlmedge.json`, which describes and proves them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

from vlmedge.errors import BundleError, UsageError
from vlmedge.limits import Limits
from vlmedge.records import decode, encode
from vlmedge.schema import json_schema
from vlmedge.spec import ModelSpec

SCHEMA: Final = "vlmedge.bundle/2"
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
    """The quantization profile, a digest of its rules, and what came of it over all weights.

    `kv_cache` is the type in which the format's runtime keeps keys and values, which may differ from the profile's;
    `limits` are those of the bundle's format.
    """

    name: str
    digest: str
    parameters: int
    bits_per_weight: float
    kv_cache: Literal["f32", "f16", "int8"]
    limits: tuple[Limits, ...]


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
    """The content of `vlmedge.json`. `flavour`: which of the format's ways to write its files, "" where it has one."""

    schema: Literal["vlmedge.bundle/2"]
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
    flavour: str = ""


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
            file = self.path / entry.path
            try:
                found = file_entry(self.path, entry.path, entry.role)
            except OSError as error:
                raise BundleError(f"{file} cannot be read: {error.strerror}") from None
            for number, (wanted, got) in enumerate(zip(entry.chunks, found.chunks, strict=False)):
                if wanted != got:
                    raise BundleError(f"{file} is damaged in chunk {number} of {CHUNK >> 20} MiB; copy it again")
            if found != entry:
                raise BundleError(f"{file} is not what the manifest describes; copy it again")


def is_bundle(path: Path) -> bool:
    """Does the folder hold a manifest?"""
    return os.path.isfile(path / MANIFEST)


def bundle_around(path: Path) -> Path | None:
    """The bundle that a file or folder is part of, or None; what does not exist is part of none."""
    parents = (*path.parents, *path.absolute().parents) if os.path.exists(path) else ()
    return next((parent for parent in parents if is_bundle(parent)), None)


def open_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Open a bundle: the manifest is read and every file's presence and size are checked (hashes: `Bundle.check`)."""
    if not os.fspath(path):
        raise UsageError("the bundle's name is empty")
    folder = Path(path)
    data = _manifest_data(folder)
    found = data.get("schema") if isinstance(data, dict) else None
    if found != SCHEMA:
        newer = isinstance(found, str) and found.startswith(SCHEMA.rpartition("/")[0] + "/")
        todo = "pip install --upgrade vlmedge" if newer else "export it again"
        raise BundleError(f"{folder} has the schema {str(found)[:40]!r}, this version reads {SCHEMA!r}; {todo}")
    manifest = decode(Manifest, data, MANIFEST, BundleError)
    _check_names(manifest)
    _check_numbers(manifest.model, "model")
    for entry in manifest.files:
        file = folder / entry.path
        if not file.is_file():
            raise BundleError(f"{folder} lacks {entry.path}; copy the bundle again")
        if file.stat().st_size != entry.bytes:
            raise BundleError(f"{file} has {file.stat().st_size} bytes instead of {entry.bytes}; copy it again")
    return Bundle(folder, manifest)


def schema_text() -> str:
    """The JSON schema of `vlmedge.json`, as it ships in `bundle.schema.json`."""
    return json.dumps(json_schema(Manifest, SCHEMA), indent=1) + "\n"


def _manifest_data(folder: Path) -> Any:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        around = bundle_around(folder)
        if around is not None:
            raise BundleError(f"{folder} is not a bundle but part of one; name {around}") from None
        what = f"it has no {MANIFEST}" if folder.exists() else "there is no such folder"
        if (folder / "config.json").is_file() or str(folder).startswith("demo:"):
            what = "it is a checkpoint; export it first"
        raise BundleError(f"{folder} is not a bundle: {what}") from None
    except OSError as error:
        raise BundleError(f"{folder / MANIFEST} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{folder / MANIFEST} is damaged: {error}") from None


def _check_names(manifest: Manifest) -> None:
    """Every name is a plain relative path, listed once, and nothing refers to a file that is not listed."""
    names = [entry.path for entry in manifest.files]
    for name in names:
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts or set(name) & set("\\:\0"):
            raise BundleError(f"the manifest names {name!r}, which is outside the bundle; do not use it")
    wanted = [manifest.tokenizer.file, *(f for c in manifest.components for f in c.files)]
    wrong = [n for n in names if names.count(n) > 1] + [n for n in wanted if n not in names]
    if wrong:
        raise BundleError(f"the manifest must list {wrong[0]!r} exactly once among its files; export it again")


def _check_numbers(part: Any, where: str) -> None:
    """Numbers that no model has would end in strange errors, or in none at all for a long time."""
    if not dataclasses.is_dataclass(part):
        return
    for field_ in dataclasses.fields(part):
        value, path = getattr(part, field_.name), f"{where}.{field_.name}"
        if isinstance(value, int) and not isinstance(value, bool):
            least = 0 if field_.name in _MAY_BE_NONE else 1
            if not least <= value <= _LARGEST.get(field_.name, 1 << 31):
                raise BundleError(f"{MANIFEST} says {path} = {str(value)[:20]}, which no model has; export it again")
        elif field_.name == "std" and 0 in value:
            raise BundleError(f"{MANIFEST} says {path} = {value}: pixels are divided by it; export it again")
        else:
            _check_numbers(value, path)


_MAY_BE_NONE = frozenset(("max_objects", "margin", "rope_dims", "ids", "stop", "banned", "coordinate", "axis"))
_LARGEST = {"layers": 10_000}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `vlmedge.json`, the last file of a bundle."""
    data = json.dumps(encode(manifest), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
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
