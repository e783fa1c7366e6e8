"""Fetching checkpoints from the Hugging Face hub: only the files that are needed, through the hub's own cache.

huggingface_hub does the work (cache, resume, offline mode, tokens); this module chooses the files and turns
every failure into one line. HF_ENDPOINT, HF_HUB_OFFLINE and HF_HUB_CACHE or HF_HOME are honoured.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmedge.errors import HubError, nearest
from vlmedge.selection import select_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

Notice = Callable[[str], None]
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows has no quota errno
CONFIG = "config.json"
_ATTEMPTS = 3  # huggingface_hub 2 resumes by itself; before 2 it keeps what it has and gives up
_TIMEOUT = 20.0  # seconds for the one question that is asked before anything is downloaded
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Place:
    """One revision of one repository, at the endpoint and in the cache of this call."""

    repo: str
    revision: str
    cache: Path
    endpoint: str

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision[:12]}"


def is_hub_id(text: str) -> bool:
    """Tell whether it is written like `owner/name`."""
    return _ID.fullmatch(text) is not None and ".." not in text and "--" not in text


def fetch_folder(
    repo: str,
    revision: str,
    *,
    quiet: bool = False,
    allow_pickle: bool = False,
    cache: Path | None = None,
    notice: Notice | None = None,
) -> tuple[Path, str]:
    """Return the cached folder of a checkpoint and the commit that `revision` (branch, tag, commit) stands for.

    Downloads config, tokenizer, small code files and the weights: safetensors; pickles only where there are
    no safetensors and `allow_pickle`. What the cache has is not downloaded again; a broken connection is
    resumed. Without a network the cache is used, and `notice` is told (the log, unless given). `quiet` hides
    the hub's progress bars; `cache` replaces the hub's own folder. Raises HubError.
    """
    place = _place(repo, revision, cache)
    info = None if _offline() else _ask(place, CONFIG, notice)
    if info is None:
        folder = _cached_folder(place)
        return folder, folder.name
    from huggingface_hub import snapshot_download

    at_commit = replace(place, revision=info.sha or revision)
    sizes = {s.rfilename: s.size or 0 for s in info.siblings or []}
    names = select_files(str(place), sizes, lambda name: _download(at_commit, name, quiet), allow_pickle)
    others = [name for name in names if name != CONFIG]
    _persist(
        place,
        quiet,
        lambda: snapshot_download(
            repo, revision=revision, cache_dir=place.cache, endpoint=place.endpoint, allow_patterns=others
        ),
    )
    config = _download(place, CONFIG, quiet)  # the last, so that its presence says that nothing is missing
    return config.parent, config.parent.name


def fetch_file(
    repo: str,
    revision: str,
    name: str,
    *,
    quiet: bool = True,
    cache: Path | None = None,
    notice: Notice | None = None,
) -> Path:
    """Return the cached path of one file of a repository; the network is not asked for a commit that is cached.

    Raises HubError.
    """
    place = _place(repo, revision, cache)
    known = _cached_file(place, name) if _COMMIT.fullmatch(revision) else None
    if known is not None:
        return known
    info = None if _offline() else _ask(place, name, notice)
    if info is None:
        known = _cached_file(place, name)
        if known is None:
            raise HubError(f"{name} of {place} is not in the cache {place.cache}; unset HF_HUB_OFFLINE and run again")
        return known
    return _download(place, name, quiet)


def _place(repo: str, revision: str, cache: Path | None) -> _Place:
    if not is_hub_id(repo):
        raise HubError(f"'{repo[:100]}' is no hub id; write it like vikhyatk/moondream2")
    if (
        not revision
        or len(revision) > 200
        or not revision.isprintable()
        or ".." in revision
        or revision.startswith("/")
    ):
        raise HubError(f"{revision[:100]!r} is no revision of {repo}; give a branch, a tag or a commit")
    from huggingface_hub import constants

    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    if not endpoint.startswith(("http://", "https://")):
        raise HubError(f"HF_ENDPOINT is {endpoint!r}, which is no http:// or https:// address; correct or unset it")
    return _Place(repo, revision, cache or Path(constants.HF_HUB_CACHE), endpoint)


def _offline() -> bool:
    values = (os.environ.get("HF_HUB_OFFLINE"), os.environ.get("TRANSFORMERS_OFFLINE"))
    return any((value or "").upper() in ("1", "ON", "YES", "TRUE") for value in values)


def _api(place: _Place) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(endpoint=place.endpoint, library_name="vlmedge")


def _ask(place: _Place, name: str, notice: Notice | None) -> ModelInfo | None:
    """What the hub says of the revision, or None where it cannot be reached and the cache has `name`."""
    try:
        return _api(place).model_info(place.repo, revision=place.revision, timeout=_TIMEOUT, files_metadata=True)
    except _failures() as error:
        status = _status(error)
        if status is not None and status < 500 and status not in (408, 429):
            raise _explain(place, error) from None
        reason = f"{place.endpoint} cannot be reached ({_line(error)})"
    except (TypeError, KeyError):
        reason = f"{place.endpoint} does not answer like a hub"
    if _cached_file(place, name) is None:
        raise HubError(f"{place} is not in the cache, and {reason}; connect to the network, or give a folder")
    (notice or _log.warning)(f"{reason}; using what the cache has of {place}")
    return None


def _download(place: _Place, name: str, quiet: bool) -> Path:
    from huggingface_hub import hf_hub_download

    found = _persist(
        place,
        quiet,
        lambda: hf_hub_download(
            place.repo, name, revision=place.revision, cache_dir=place.cache, endpoint=place.endpoint
        ),
        name,
    )
    return Path(found)


def _persist(place: _Place, quiet: bool, call: Callable[[], str], name: str = "") -> str:
    """Return what `call` downloads; a connection that breaks is taken up again, every other failure is explained."""
    for attempt in range(_ATTEMPTS):
        try:
            with _bars(quiet):
                return call()
        except _failures() as error:
            if attempt == _ATTEMPTS - 1 or not _may_pass(error):
                raise _explain(place, error, name) from None
    raise AssertionError("the last attempt returns or raises")


def _cached_file(place: _Place, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(place.repo, name, cache_dir=place.cache, revision=place.revision)
    return Path(found) if isinstance(found, str) else None


def _cached_folder(place: _Place) -> Path:
    config = _cached_file(place, CONFIG)
    if config is None:
        raise HubError(
            f"{place} is not in the cache {place.cache}, and HF_HUB_OFFLINE is set; unset it, or give a folder"
        )
    return config.parent


@contextmanager
def _bars(quiet: bool) -> Iterator[None]:
    """Hide the hub's progress bars, unless the user's environment decides about them."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if not quiet or "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _failures() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises; its base is requests', httpx' or httpx2's error, by its version."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    bases: tuple[Any, ...] = HfHubHTTPError.__bases__
    return (OSError, ValueError, EntryNotFoundError, *bases)


def _status(error: Exception) -> int | None:
    code = getattr(getattr(error, "response", None), "status_code", None)
    return code if isinstance(code, int) else None


def _may_pass(error: Exception) -> bool:
    """Tell whether it is the connection that failed: neither an answer of the hub nor the disk."""
    disk = isinstance(error, OSError) and (error.errno in _FULL or error.filename is not None)
    from huggingface_hub.errors import EntryNotFoundError

    return _status(error) is None and not disk and not isinstance(error, EntryNotFoundError)


def _explain(place: _Place, error: Exception, name: str = "") -> HubError:
    """The one line for a failure: what was asked, what is true, what to do."""
    from huggingface_hub import errors

    page = f"{place.endpoint}/{place.repo}"
    if isinstance(error, errors.GatedRepoError):
        return HubError(
            f"{place.repo} is gated: accept its terms at {page}, then log in (hf auth login) or set HF_TOKEN"
        )
    if isinstance(error, errors.RepositoryNotFoundError) or _status(error) in (401, 403):
        return HubError(
            f"{place.repo} does not exist at {place.endpoint}, or you may not read it; "
            "check the name, or log in (hf auth login) or set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{place.repo} has no revision '{place.revision}'{nearest(place.revision, _revisions(place))}")
    if isinstance(error, errors.EntryNotFoundError) and name:
        return HubError(f"{place} has no file {name}; check the revision at {page}")
    if isinstance(error, OSError) and error.errno in _FULL:
        return HubError(f"no room for {place} in {place.cache}: free space there, or set HF_HOME to another disk")
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return HubError(f"{error.filename} cannot be written: {error.strerror}; set HF_HOME to a folder that can")
    return HubError(f"{place} could not be downloaded ({_line(error)}); run it again: finished files are kept")


def _revisions(place: _Place) -> list[str]:
    """Branches and tags, for a suggestion; none where even they cannot be had."""
    try:
        refs = _api(place).list_repo_refs(place.repo)
    except _failures():
        return []
    return [ref.name for ref in (*refs.branches, *refs.tags)][:50]


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
