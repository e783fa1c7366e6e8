"""Which files of a hub repository make up a checkpoint: config, tokenizer, code as text, and one set of weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path

from vlmedge.errors import HubError
from vlmedge.pickles import INDEX as PICKLE_INDEX
from vlmedge.pickles import select_pickles
from vlmedge.tensorfile import INDEX, SINGLE

SMALL = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*"),
    "*.py",
)
CODE_LIMIT = 1 << 20  # bytes of a *.py; they are read as text, to tell releases apart, and never run


def select_files(
    label: str, sizes: Mapping[str, int], fetch: Callable[[str], Path], allow_pickle: bool = False
) -> list[str]:
    """Return the names to download, all from the top folder of the repository `label`.

    `sizes`: every file's name -> bytes. `fetch` gets one small file early (the index that names the shards).
    Raises HubError for a repository without a config or without weights that may be read.
    """
    top = {name: size for name, size in sizes.items() if not set(name) & set("/\\*?[")}
    if "config.json" not in top:
        raise HubError(f"{label} has no config.json, so it is no checkpoint that can be read; give another repository")
    small = [name for name in top if any(fnmatch(name, pattern) for pattern in SMALL)]
    kept = [name for name in small if not name.endswith(".py") or top[name] <= CODE_LIMIT]
    return kept + _weights(label, top, fetch, allow_pickle)


def _weights(label: str, top: Mapping[str, int], fetch: Callable[[str], Path], allow_pickle: bool) -> list[str]:
    """The same choice as `checkpoint.open_folder` makes."""
    if SINGLE in top:
        return [SINGLE]
    if INDEX in top:
        return [INDEX, *sorted(_shards(label, fetch(INDEX)) & top.keys())]
    loose = sorted(name for name in top if name.endswith(".safetensors"))
    pickles = select_pickles(top)
    if not loose and not pickles:
        raise HubError(f"{label} has no safetensors and no PyTorch weights; give the repository that has the original")
    if not loose and not allow_pickle:
        raise HubError(
            f"{label} has only pickled weights ({pickles[0]}), which can run code when they are read; "
            "--allow-pickle reads them with torch's restricted loader"
        )
    return loose or [*pickles, *({PICKLE_INDEX} & top.keys())]


def _shards(label: str, index: Path) -> set[str]:
    try:
        return {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError):
        raise HubError(f"{INDEX} of {label} has no table 'weight_map'; use another revision") from None
