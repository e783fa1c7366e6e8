"""What a user may name as a checkpoint, and opening it: a folder, a known release, a hub id, or a demo."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from vlmedge.checkpoint import Checkpoint, Source, open_folder
from vlmedge.errors import UsageError, nearest
from vlmedge.hub import Notice, fetch_file, fetch_folder, is_hub_id

DEMO = "demo:"
DEMO_LICENCE = "Apache-2.0"  # of the checkpoints that vlmedge trained itself: the same as its code
DEFAULT_REVISION = "main"
BUNDLE_FILE = "vlmedge.json"


def open_source(
    source: str,
    known: Mapping[str, tuple[str, str]],
    *,
    allow_pickle: bool = False,
    quiet: bool = False,
    demo: Callable[[str], Path] | None = None,
    cache: Path | None = None,
    notice: Notice | None = None,
) -> Checkpoint:
    """Open the checkpoint that `source` names.

    In this order: `demo:NAME` (`demo` gives its folder); a name in `known` (-> repo, revision), with another
    revision after `@` if wanted; a folder; a hub id `owner/name[@revision]` (revision `main` unless given).
    `notice` is told when the network is down and the cache is used instead (by default the log is).
    Raises UsageError for what none of them is, HubError and CheckpointError from fetching and opening.
    """
    fetcher = partial(fetch_file, cache=cache, notice=notice)
    if source.startswith(DEMO):
        folder = _demo(source.removeprefix(DEMO), demo)
        return open_folder(folder, Source(source), allow_pickle=allow_pickle, fetcher=fetcher)
    if source.partition("@")[0] not in known and (_is_path(source) or os.path.exists(source)):
        folder = _local(source)
        return open_folder(folder, Source(source), allow_pickle=allow_pickle, fetcher=fetcher)
    repo, wanted = _remote(source, known)
    folder, commit = fetch_folder(repo, wanted, quiet=quiet, allow_pickle=allow_pickle, cache=cache, notice=notice)
    return open_folder(folder, Source(source, repo, wanted, commit), allow_pickle=allow_pickle, fetcher=fetcher)


def _remote(source: str, known: Mapping[str, tuple[str, str]]) -> tuple[str, str]:
    """The repository and revision of a known name or a hub id."""
    name, at, revision = source.partition("@")
    if at and not revision:
        raise UsageError(f"'{source}' has nothing after the @; give a branch, a tag or a commit, or leave the @ out")
    if name in known:
        repo, pinned = known[name]
        return repo, revision or pinned
    if is_hub_id(name):
        return name, revision or DEFAULT_REVISION
    if "://" in source:
        raise UsageError(f"'{source}' is an address; give the hub id alone, like vikhyatk/moondream2@2025-06-21")
    raise UsageError(
        f"unknown model '{source[:200]}'{nearest(name[:200], known)} (or give a folder, or a hub id owner/name)"
    )


def _is_path(source: str) -> bool:
    """Tell whether it is written as a path; `owner/name` is not."""
    drive = os.path.splitdrive(source)[0] != ""
    return source.startswith((".", "/", "~", "\\")) or source.endswith(("/", os.sep)) or drive


def _local(source: str) -> Path:
    folder = Path(os.path.expanduser(source))
    if os.path.isfile(folder):
        raise UsageError(f"{source} is a file; give the folder that holds config.json and the weights")
    if not os.path.isdir(folder):
        raise UsageError(f"there is no folder {source[:200]}")
    if (folder / BUNDLE_FILE).is_file():
        raise UsageError(
            f"{source} is an exported bundle, not a checkpoint; 'vlmedge run' and 'vlmedge inspect' take it"
        )
    return folder


def _demo(name: str, demo: Callable[[str], Path] | None) -> Path:
    if demo is None:
        raise UsageError(f"'{DEMO}{name}' cannot be opened here; give a folder, a known model or a hub id")
    return demo(name)
