"""A checkpoint: its config, its lazily read tensors, and where it came from. Nothing is read before it is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmedge.errors import CheckpointError
from vlmedge.tensorfile import open_safetensors
from vlmedge.tensors import Tensor

INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.pth", "model.pt")
Fetch = Callable[[str, str, str], Path]


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
        """The text of a file beside the weights, or None."""
        path = self.folder / name
        try:
            return path.read_text(encoding="utf-8") if path.is_file() else None
        except UnicodeDecodeError:
            raise CheckpointError(f"{name} of {self.source.label} is not UTF-8 text") from None

    def fetch(self, repo: str, revision: str, name: str, why: str) -> Path:
        """A file of another repository, through the same hub access; raises CheckpointError where there is none."""
        if self.fetcher is None:
            raise CheckpointError(f"{self.source.label}: {why}, and {name} of {repo} is needed instead")
        try:
            return self.fetcher(repo, revision, name)
        except CheckpointError as error:
            raise CheckpointError(
                f"{self.source.label}: {why}; it needs {name} of {repo} at {revision[:12]}, which could not be had ({error}); "
                f"put that file into the folder"
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
    single = folder / "model.safetensors"
    if (folder / INDEX).is_file():
        return _shards(folder)
    if single.is_file():
        return open_safetensors(single), (single,)
    loose = sorted(folder.glob("*.safetensors"))
    if loose:
        tensors: dict[str, Tensor] = {}
        for path in loose:
            tensors |= open_safetensors(path)
        return tensors, tuple(loose)
    pickles = [folder / name for name in PICKLES if (folder / name).is_file()]
    pickles += sorted(set(folder.glob("*.bin")) - set(pickles))
    if pickles:
        from vlmedge.pickles import open_pickles  # torch, only where it is asked for

        return open_pickles(folder, pickles, allow_pickle)
    raise CheckpointError(f"{folder} has no model.safetensors and no {INDEX}")


def _shards(folder: Path) -> tuple[dict[str, Tensor], tuple[Path, ...]]:
    index = _json(folder / INDEX)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
        raise CheckpointError(f"{folder / INDEX} has no table 'weight_map'")
    shards = sorted(set(names.values()))
    for shard in shards:
        if Path(shard).name != shard:
            raise CheckpointError(f"{INDEX} names the shard {shard!r}, which is not a plain file name")
        if not (folder / shard).is_file():
            raise CheckpointError(f"the shard {shard} is missing from {folder}; download it again")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        found = open_safetensors(folder / shard)
        tensors |= {name: tensor for name, tensor in found.items() if names.get(name, shard) == shard}
    lost = [name for name in names if name not in tensors]
    if lost:
        raise CheckpointError(f"{INDEX} names {lost[0]!r} in {names[lost[0]]}, which does not hold it")
    return tensors, tuple(folder / shard for shard in shards)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; is it a checkpoint folder?") from None
    except (ValueError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
