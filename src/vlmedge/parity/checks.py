"""What can be held against the checkpoint without running a model: facts in files, prompts, token ids, crops."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from vlmedge import imaging
from vlmedge.bundle import Manifest
from vlmedge.contract import image_contract, prompt_contract
from vlmedge.parity.metrics import finite
from vlmedge.parity.outcomes import judged_facts
from vlmedge.parity.preprocess import difference
from vlmedge.parity.record import Sight
from vlmedge.parity.report import StageResult
from vlmedge.parity.texts import TEXTS
from vlmedge.prompt import Tokenizer
from vlmedge.records import encode
from vlmedge.reference import preprocess
from vlmedge.spec import ImageSpec, ModelSpec

_F32 = 1e-6  # files keep many numbers in float32
_EIGHTHS = (1, 5, 8, 11, 14, 19, 27, 42, 85, 250)  # of a crop: pictures of one crop, several, as many as there may be


def check_facts(stated: Mapping[str, Any], manifest: Manifest, original: ModelSpec) -> StageResult:
    """What the files state of the model, and what the manifest does but for its prompts, against the checkpoint."""
    stated = {path: value for path, value in stated.items() if not path.startswith("tokenizer.")}
    told = _parts(_json(manifest.image), _json(image_contract(original.image)), "image")
    wrong = [
        f"the files say {path} = {_short(value)}, the model has {_short(_at(original, path))}"
        for path, value in stated.items()
        if not _equal(value, _at(original, path))
    ]
    wrong += [
        f"the manifest says {path} = {_short(a)}, the checkpoint {_short(b)}"
        for path, a, b in _parts(encode(manifest.model), encode(original))
        if not path.startswith("prompt")
    ]
    wrong += [f"the manifest tells apps {path} = {_short(a)}, not {_short(b)}" for path, a, b in told]
    return judged_facts("facts", wrong, {"facts": len(stated)})


def check_prompts(
    manifest: Manifest,
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
        for path, a, b in _parts(encode(manifest.model.prompt), encode(original.prompt), "prompt")
    ]
    if tokenizer.content != wanted.content and json.loads(tokenizer.content) != json.loads(wanted.content):
        wrong.append("the bundle's tokenizer.json is not the checkpoint's")
    told = _parts(_json(manifest.prompt), _json(prompt_contract(original)), "prompt")
    wrong += [f"the manifest tells apps {path} = {_short(a)}, not {_short(b)}" for path, a, b in told]
    for text in TEXTS:
        found, right = tokenizer.encode(text), wanted.encode(text)
        if found != right:
            wrong.append(f"{_short(text)} becomes the ids {_short(found)} instead of {_short(right)}")
    return judged_facts("prompt", wrong, {"texts": len(TEXTS)})


def check_crops(sights: list[Sight], spec: ImageSpec) -> StageResult:
    """The runtime's crops against those of an implementation that shares no code with it, byte by byte.

    Pictures of many sizes are not cut for it: how many crops they would have is compared too.
    """
    found = [(s.name, difference(s.picture, s.tiling, s.pixels, spec)) for s in sights]
    wrong = [f"{name}: {result.why}" for name, result in found if result.why]
    sizes = list(product([spec.size * part // 8 for part in _EIGHTHS], repeat=2))
    for height, width in sizes:
        ours, wanted = imaging.tiling_of(height, width, spec), preprocess.tiling(height, width, spec)
        if ours != wanted:
            wrong.append(f"a picture of {height} x {width} would be cut into {ours} instead of {wanted} crops")
    return StageResult(
        "preprocess",
        None,
        "failed" if wrong else "passed",
        finite(max((result.relative_rms for _, result in found), default=0.0)),
        float(max((result.max_abs for _, result in found), default=0)),
        0.0,
        {"pictures": len(found), "sizes": len(sizes)},
        0,
        "; ".join(wrong[:1]),
    )


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


def _json(value: Any) -> Any:
    """Lists for tuples, as a manifest that was read has them."""
    return json.loads(json.dumps(value))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
