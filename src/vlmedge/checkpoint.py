"""A checkpoint: its config, its lazily read tensors, and where it came from. Nothing is read before it is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vlmedge.errors import CheckpointError
from vlmedge.pickles import open_pickles, select_pickles
from vlmedge.tensorfile import INDEX, SINGLE, open_safetensors, short
from vlmedge.tensors import Tensor

Fetch = Callable[[str, str, str], Path]
TEXT_LIMIT = 128 << 20  # bytes; the largest tokenizer.json of today has 35 MB


@dataclass(frozen=True, slots=True)
class Source:
    """Where a checkpoint came from. `commit` is the hub's hash of the revision; both are empty for a folder."""

    label: str
    repo: str = ""
    revision: str = ""
    commit: str = ""


@dataclass(slots=True)
class Checkpoint:
    """An opened checkpoint folder (the hub's cache has folders too)."""

    source: Source
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    files: tuple[Path, ...] = ()
    fetcher: Fetch | None = field(default=None, repr=False)

    def text(self, name: str) -> str | None:
        """The text of a file beside the weights, or None; raises CheckpointError where it cannot be read as text."""
        path = self.folder / name
        return _text(path) if path.is_file() else None

    def fetch(self, repo: str, revision: str, name: str, why: str) -> Path:
        """A file of another repository, through the same hub access; raises CheckpointError where there is none."""
        if self.fetcher is None:
            raise CheckpointError(
                f"{self.source.label}: {why}, and {name} of {repo} is needed instead; put that file into the folder"
            )
        try:
            return self.fetcher(repo, revision, name)
        except CheckpointError as error:
            raise CheckpointError(
                f"{self.source.label}: {why}; it needs {name} of {repo} at {revision[:12]}, "
                f"which could not be had ({error}); put that file into the folder"
            ) from None


def open_folder(
    folder: Path, source: Source | None = None, *, allow_pickle: bool = False, fetcher: Fetch | None = None
) -> Checkpoint:
    """Open a folder with config.json and safetensors (one file, or shards with their index).

    Raises CheckpointError for a missing or damaged file, and for pickled weights unless `allow_pickle`.
    """
    source = source or Source(label=str(folder))
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    config = _json(folder / "config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'} is not a table")
    tensors, files = _weights(folder, allow_pickle)
    return Checkpoint(source, folder, config, tensors, files, fetcher)


def _weights(folder: Path, allow_pickle: bool) -> tuple[dict[str, Tensor], tuple[Path, ...]]:
    """One file before shards, as transformers does; safetensors of any name before pickles."""
    if (folder / SINGLE).is_file():
        return open_safetensors(folder / SINGLE), (folder / SINGLE,)
    if (folder / INDEX).is_file():
        return _shards(folder)
    loose = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if loose:
        return _joined(loose), tuple(loose)
    pickles = select_pickles(path.name for path in folder.iterdir() if path.is_file())
    if pickles:
        return open_pickles(folder, [folder / name for name in pickles], allow_pickle)
    raise CheckpointError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}; is it a checkpoint folder?")


def _shards(folder: Path) -> tuple[dict[str, Tensor], tuple[Path, ...]]:
    index = _json(folder / INDEX)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()) or not names:
        raise CheckpointError(f"{folder / INDEX} has no table 'weight_map'; download it again")
    shards = sorted(set(names.values()))
    for shard in shards:
        if not _plain(shard):
            raise CheckpointError(f"{INDEX} names the shard {short(shard)}, which is not a plain file name")
        if not (folder / shard).is_file():
            raise CheckpointError(f"the shard {shard} is missing from {folder}; download it again")
    files = tuple(folder / shard for shard in shards)
    tensors = _joined(files, names)
    lost = [name for name in names if name not in tensors]
    if lost:
        raise CheckpointError(f"{INDEX} names {short(lost[0])} in {names[lost[0]]}, which does not hold it")
    return tensors, files


def _joined(files: Iterable[Path], place: Mapping[str, str] = MappingProxyType({})) -> dict[str, Tensor]:
    """The tensors of all `files`; of two with one name `place` says which file is meant."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        found = {n: t for n, t in open_safetensors(path).items() if place.get(n, path.name) == path.name}
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise CheckpointError(
                f"{short(twice[0])} stands in {path.name} and in another file of {path.parent}; "
                "which one is meant cannot be told"
            )
        tensors |= found
    return tensors


def _plain(shard: str) -> bool:
    """Tell whether it is a file name that cannot lead out of its folder, here or on Windows."""
    return 0 < len(shard) <= 200 and shard not in (".", "..") and shard.isprintable() and not set(shard) & set("/\\:")


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {' '.join(str(error).split())[:200]}") from None


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > TEXT_LIMIT:
            raise CheckpointError(f"{path} has more than {TEXT_LIMIT >> 20} MiB and cannot be meant")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; is it a checkpoint folder?") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is not UTF-8 text") from None
