"""The models that a run compares: looked at, hashed and named; an original in its own type and in float32."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vlmedge.bundle import open_bundle
from vlmedge.errors import UsageError
from vlmedge.loading import describe, local_folder
from vlmedge.progress import Progress
from vlmedge.subject import Subject, examine

DTYPES: Final = ("f32", "f16", "bf16")  # those that the original can be opened in


@dataclass(frozen=True, slots=True)
class Model:
    """A model to run. `dtypes`: of a checkpoint, those that it is opened in; ("",) for a bundle."""

    subject: Subject
    bits_per_weight: float | None
    dtypes: tuple[str, ...]
    is_original: bool = False


def look(
    sources: Sequence[str], original: str | None, *, allow_pickle: bool = False, progress: Progress | None = None
) -> list[Model]:
    """The models that a user names, the original first; their files are read and hashed.

    Raises UsageError for a model that is named twice or an original that is a bundle, and what `examine` raises.
    """
    progress = progress or Progress()
    if not sources and original is None:
        raise UsageError("a benchmark needs at least one bundle or checkpoint")
    names = [*([original] if original is not None else []), *sources]
    found: list[Model] = []
    for number, (name, label) in enumerate(zip(names, _labels(names), strict=True)):
        progress.stage(f"checking {name}")
        subject = examine(_absolute(name), label, allow_pickle=allow_pickle, progress=progress)
        if any(subject.digest == other.subject.digest for other in found):
            raise UsageError(f"{name} is the same model as another one that is named; a model is measured once")
        is_original = original is not None and number == 0
        if is_original and subject.is_bundle:
            raise UsageError(f"{name} is a bundle; the original is a checkpoint")
        found.append(_model(subject, is_original, allow_pickle))
    return found


def _model(subject: Subject, is_original: bool, allow_pickle: bool) -> Model:
    if subject.is_bundle:
        return Model(subject, open_bundle(Path(subject.source)).manifest.profile.bits_per_weight, ("",))
    own = _own_dtype(subject.source, allow_pickle)
    dtypes = (own, "f32") if is_original and own != "f32" else (own,)
    return Model(subject, None, dtypes, is_original)


def _own_dtype(source: str, allow_pickle: bool) -> str:
    """The type that holds most of a checkpoint's weights."""
    sizes: Counter[str] = Counter()
    for tensor in describe(source, allow_pickle=allow_pickle).tensors.values():
        sizes[tensor.dtype] += tensor.size
    most = sizes.most_common(1)[0][0]
    return most if most in DTYPES else "f32"


def _labels(names: Sequence[str]) -> list[str]:
    """The last part of each path, where that is enough to tell them apart; other names as they are."""
    last = [Path(os.path.abspath(name)).name if os.path.isdir(name) else name for name in names]
    return last if len(set(last)) == len(names) else list(names)


def _absolute(name: str) -> str:
    """A folder's whole path: a worker may be started elsewhere. Other names (releases, hub, demo:...) as they are."""
    folder = local_folder(name)
    return name if folder is None else os.path.abspath(folder)
