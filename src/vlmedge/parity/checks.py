"""What can be held against the checkpoint without running a model: facts in files, prompts, token ids, crops."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from vlmedge.parity.metrics import finite
from vlmedge.parity.preprocess import difference
from vlmedge.parity.record import Sight
from vlmedge.parity.report import StageResult
from vlmedge.parity.texts import TEXTS
from vlmedge.prompt import Tokenizer
from vlmedge.records import encode
from vlmedge.spec import ImageSpec, ModelSpec

_F32 = 1e-6  # files keep many numbers in float32


def check_facts(stated: Mapping[str, Any], ours: ModelSpec, original: ModelSpec) -> StageResult:
    """What the files state of the model, and what the manifest does but for its prompts, against the checkpoint."""
    stated = {path: value for path, value in stated.items() if not path.startswith("tokenizer.")}
    wrong = [
        f"the files say {path} = {_short(value)}, the model has {_short(_at(original, path))}"
        for path, value in stated.items()
        if not _equal(value, _at(original, path))
    ]
    wrong += [
        f"the manifest says {path} = {_short(a)}, the checkpoint {_short(b)}"
        for path, a, b in _parts(encode(ours), encode(original))
        if not path.startswith("prompt")
    ]
    return _check("facts", wrong, {"facts": len(stated)})


def check_prompts(
    ours: ModelSpec,
    original: ModelSpec,
    tokenizer: Tokenizer,
    wanted: Tokenizer,
    stated: Mapping[str, Any],
    expected: Mapping[str, Any],
) -> StageResult:
    """Templates and stop rules, the ids of texts of many kinds, and the vocabulary inside the files where one is."""
    wrong = [
        f"{path} in the files is not that of the checkpoint's tokenizer"
        for path in expected
        if stated.get(path) != expected[path]
    ]
    wrong += [
        f"the manifest says {path} = {_short(a)}, the checkpoint {_short(b)}"
        for path, a, b in _parts(encode(ours.prompt), encode(original.prompt), "prompt")
    ]
    for text in TEXTS:
        found, right = tokenizer.encode(text), wanted.encode(text)
        if found != right:
            wrong.append(f"{_short(text)} becomes the ids {_short(found)} instead of {_short(right)}")
    return _check("prompt", wrong, {"texts": len(TEXTS)})


def check_crops(sights: list[Sight], spec: ImageSpec) -> StageResult:
    """The runtime's crops against those of an implementation that shares no code with it, byte by byte."""
    found = [(s.name, difference(s.picture, s.tiling, s.pixels, spec)) for s in sights]
    wrong = [f"{name}: {result.why}" for name, result in found if result.why]
    return StageResult(
        "preprocess",
        None,
        "failed" if wrong else "passed",
        finite(max((result.relative_rms for _, result in found), default=0.0)),
        float(max((result.max_abs for _, result in found), default=0)),
        0.0,
        {"pictures": len(found)},
        0,
        "; ".join(wrong[:1]),
    )


def _check(stage: str, wrong: list[str], numbers: dict[str, float]) -> StageResult:
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    why = wrong[0] + more if wrong else ""
    return StageResult(stage, None, "failed" if wrong else "passed", None, None, None, numbers, 0, why)


def _at(spec: ModelSpec, path: str) -> Any:
    """The value at a dotted path; None where the model has no such part."""
    value: Any = spec
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, (tuple, list)) and isinstance(theirs, (tuple, list)):
        return len(ours) == len(theirs) and all(_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    if isinstance(ours, float) and isinstance(theirs, (int, float)):
        return math.isclose(ours, theirs, rel_tol=_F32)
    return bool(ours == theirs)


def _parts(ours: Any, theirs: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted paths at which two JSON values differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in dict.fromkeys((*ours, *theirs)):
            yield from _parts(ours.get(key), theirs.get(key), f"{path}.{key}".lstrip("."))
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            yield from _parts(a, b, f"{path}[{i}]")
    elif ours != theirs:
        yield path, ours, theirs


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
