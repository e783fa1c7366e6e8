"""What stock programs are asked to time for a job: positions and crops of each ask, and samples from their times."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmedge.bundle import Bundle
from vlmedge.device_bench.job import Ask, Job
from vlmedge.device_bench.result import Counts, Sample
from vlmedge.errors import RuntimeFailedError, UnsupportedError
from vlmedge.imaging import tiling_of
from vlmedge.prompt import PictureSpan, Tokenizer, TokenRun, render
from vlmedge.session import Grid

Times = Mapping[str, Sequence[float]]  # stage -> milliseconds, one for each repetition


@dataclass(frozen=True, slots=True)
class Task:
    """One ask as the model's positions: `before` the picture and the picture's own are `prefix`, after it `prompt`.

    `depth`: positions at the middle of the answer.
    """

    ask: Ask
    tiling: Grid
    counts: Counts
    prefix: int
    prompt: int

    @property
    def depth(self) -> int:
        """Positions that are alive at the middle of the answer."""
        return self.prefix + self.prompt + self.counts.generated // 2


@dataclass(frozen=True, slots=True)
class Sweep:
    """Every stage timed for every ask, once around. `environment`: what the programs said of themselves, and notes."""

    samples: tuple[Sample, ...]
    environment: dict[str, Any]
    load_ms: float | None = None


def tasks(job: Job, bundle: Bundle) -> tuple[Task, ...]:
    """The job's asks. A picture of one crop is cut twice and encoded once, as `imaging.crop` does.

    Raises UnsupportedError for a model that has no such question.
    """
    spec = bundle.manifest.model
    tokenizer = Tokenizer((bundle.path / bundle.manifest.tokenizer.file).read_bytes())
    out = []
    for ask in job.work.asks:
        tiling = tiling_of(ask.height, ask.width, spec.image)
        name = "query" if ask.question else "caption/normal"
        before, after = _around_the_picture(render(spec.prompt, name, tokenizer, question=ask.question))
        local = tiling[0] * tiling[1]
        counts = Counts(
            ask.name, 1 + local, 1 if local == 1 else 1 + local, spec.image_tokens, before + after, job.work.tokens
        )
        out.append(Task(ask, tiling, counts, before + spec.image_tokens, after))
    return tuple(out)


def samples(ask: str, at: float, times: Times) -> tuple[Sample, ...]:
    """One sample for each repetition; a stage that was repeated less often is missing from the last ones."""
    repeats = max((len(values) for values in times.values()), default=0)
    rows = ({stage: values[i] for stage, values in times.items() if i < len(values)} for i in range(repeats))
    return tuple(Sample(ask, at, row) for row in rows)


def program_files(where: str, programs: Sequence[str], option: str) -> tuple[Path, ...]:
    """The programs of a build that a user names (its folder, or one program in it), and the libraries beside them.

    The first of `programs` must be there: RuntimeFailedError.
    """
    named = Path(where).expanduser()
    root = named.parent if named.is_file() else named
    found: dict[str, Path] = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and (path.name in programs or path.name.endswith(".so") or ".so." in path.name):
            found.setdefault(path.name, path)
    if programs[0] not in found:
        raise RuntimeFailedError(
            f"{where} has no {programs[0]}; name a build for Android: {option} = FOLDER in [options] of a device's TOML"
        )
    return tuple(found.values())


def digest_of(files: Iterable[Path]) -> str:
    """Sixteen digits of the names and bytes of files."""
    whole = hashlib.sha256()
    for path in sorted(files, key=lambda file: file.name):
        with path.open("rb") as file:
            whole.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()[:16]


def _around_the_picture(segments: Sequence[object]) -> tuple[int, int]:
    """Token ids before and after the picture."""
    sides = [0, 0]
    seen = 0
    for segment in segments:
        if isinstance(segment, PictureSpan):
            seen = 1
        elif isinstance(segment, TokenRun):
            sides[seen] += len(segment.ids)
    if not seen:
        raise UnsupportedError("this model's template has no picture, so there is nothing to time")
    return sides[0], sides[1]
