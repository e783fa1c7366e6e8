"""Self-test vectors, recorded from the bundle's own runtime."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmedge import imaging
from vlmedge.answer import Box, Point
from vlmedge.bundle import Manifest
from vlmedge.parity import pictures
from vlmedge.parity.gates import limits_for
from vlmedge.parity.metrics import NOISE, centred
from vlmedge.parity.selftest_file import (
    SCHEMA,
    CallVector,
    FoundVector,
    ModelVectors,
    PictureVector,
    ReadingVector,
    Sample,
    TextVector,
    Vectors,
)
from vlmedge.parity.texts import TEXTS
from vlmedge.parity.trace import Reading, Trace, caption_ids
from vlmedge.prompt import Tokenizer
from vlmedge.records import encode
from vlmedge.session import F32
from vlmedge.spec import ImageSpec, ModelSpec

if TYPE_CHECKING:  # it brings the reference along, which a device has not
    from vlmedge.parity.examine import Ran

TENSOR = (
    "float32, little-endian, [crops, 3, height, width] in row-major order: (value / 255 - mean) / std, a division, a "
    "subtraction and a division, each rounded to float32 (IEEE 754; no reciprocals, no fused steps)"
)
STAGES = ("features", "projected", "logits", "regions")
_SAMPLES = 32
_TOP = 8
_DECODED = 29  # texts that are turned back from ids, one of each kind


def record(manifest: Manifest, tokenizer: Tokenizer, ran: Ran | None) -> dict[str, Any]:
    """All vectors as JSON data; of a bundle that could not be run here only those that need no model."""
    spec = manifest.model
    vectors = Vectors(
        schema=SCHEMA,
        pixels=pictures.PIXELS,
        tensor=TENSOR,
        limits=_limits(manifest),
        noise=NOISE,
        pictures=tuple(picture_vector(*size, spec.image) for size in pictures.sizes(spec.image)),
        text=tuple(TextVector(text, tuple(tokenizer.encode(text))) for text in TEXTS),
        decoded=tuple(TextVector(tokenizer.decode(ids), tuple(ids)) for ids in map(tokenizer.encode, TEXTS[:_DECODED])),
        recorded_with=None if ran is None else ran.runtime,
        model=None if ran is None else _model(ran.trace, spec, tokenizer),
    )
    data: dict[str, Any] = _plain(encode(vectors))
    return data


def picture_vector(height: int, width: int, spec: ImageSpec) -> PictureVector:
    """Preprocessing of the formula's picture of a size, in pixels."""
    picture = pictures.pattern(height, width)
    crops = imaging.crop(picture, spec)
    tensor, hashes = imaging.normalise(crops.pixels, spec), tuple(_sha256(crop) for crop in crops.pixels)
    return PictureVector(
        height, width, _sha256(picture), crops.tiling, hashes, tensor.shape, _sha256(tensor.astype("<f4"))
    )


def chosen_from(found: Trace, reading: Reading, spec: ModelSpec) -> list[F32]:
    """For each token of a reading, the centred logits float32 [vocab] that it was chosen from, before bans."""
    label = "small picture" if reading is found.small else "large picture"
    calls = dict(found.record.readings())[label]
    first = 1 if caption_ids(spec.prompt)[1] else 0  # behind the picture's prefill
    return [centred(found.record.forwards[call].logits) for call in calls[first : first + len(reading.tokens)]]


def bins_of(found: Trace) -> list[F32]:
    """For each choice of a coordinate, a width or a height, in order, the decoder's centred output float32 [bins]."""
    read = [h for h in found.record.heads if h.read is not None and h.name.endswith("decoder")]
    return [centred(row) for h in read for row in h.outputs.reshape(2 if h.name == "size_decoder" else 1, -1)]


def _limits(manifest: Manifest) -> dict[str, float | None]:
    """What runtimes' arithmetic may differ by: kernels of other processors differ by as much as a runtime's do."""
    chosen = limits_for(manifest, "stored")
    return {stage: getattr(chosen, stage) for stage in STAGES}


def _model(found: Trace, spec: ModelSpec, tokenizer: Tokenizer) -> ModelVectors:
    return ModelVectors(
        prompt_ids=caption_ids(spec.prompt)[1],
        features=CallVector("crop 0 of picture 0", _sample(found.features)),
        local_features=CallVector("crop 1 of picture 1", _sample(found.local)),
        small=_reading("picture 0", found, found.small, spec, tokenizer),
        stitched=_reading(
            f"features in the tiling of picture 1: {pictures.FEATURES}", found, found.stitched, spec, tokenizer
        ),
        regions=dict(_regions(found, spec.decoder.width)),
        found=None if spec.region is None else _found(found),
    )


def _reading(words: str, found: Trace, reading: Reading, spec: ModelSpec, tokenizer: Tokenizer) -> ReadingVector:
    steps, tokens = chosen_from(found, reading, spec), reading.tokens
    banned = [()] + [spec.prompt.banned] * (len(tokens) - 1)  # from the second token on
    margins = [_margin(logits, ids) for logits, ids in zip(steps, banned, strict=True)]
    values = [_short(logits[token]) for logits, token in zip(steps, tokens, strict=True)]
    logits = _sample(centred(reading.logits), np.argsort(-reading.logits, kind="stable")[:_TOP])
    text = tokenizer.decode(tokens)
    return ReadingVector(words, _sample(reading.projected), logits, tokens, tuple(values), tuple(margins), text)


def _regions(found: Trace, width: int) -> Iterator[tuple[str, CallVector]]:
    """Each region head by name: what it makes of fixed inputs."""
    inputs = pictures.region_inputs(width)
    for name, values in found.regions.items():
        numbers = tuple(_short(v) for v in inputs[name])
        words = f"hidden of {width}: {pictures.FEATURES}"
        yield name, CallVector(words if name.endswith("decoder") else numbers, _sample(values))


def _found(found: Trace) -> FoundVector:
    asked = [f.ids for f in found.record.forwards if f.ids is not None and f.hidden is not None]
    things = [_rounded(thing) for things in found.found.values() for thing in things]
    rows = bins_of(found)
    return FoundVector(
        {skill: tuple(ids.tolist()) for skill, ids in zip(found.found, asked, strict=True)},
        tuple(t for t in things if isinstance(t, Box)),
        tuple(t for t in things if isinstance(t, Point)),
        tuple(int(row.argmax()) for row in rows),
        tuple(_short(row.max()) for row in rows),
        tuple(_margin(row) for row in rows),
    )


def _rounded(thing: Box | Point) -> Box | Point:
    if isinstance(thing, Point):
        return Point(_short(thing.x), _short(thing.y))
    return Box(_short(thing.x_min), _short(thing.y_min), _short(thing.x_max), _short(thing.y_max))


def _margin(values: F32, banned: Iterable[int] = ()) -> float:
    """By how much the best of what is not banned beats the second, in units of the RMS of all."""
    allowed = np.delete(values, list(banned))
    two = np.partition(allowed, -2)[-2:]
    return _short((two[1] - two[0]) / (_rms(values) or 1.0))


def _sample(array: F32, first: Iterable[int] = ()) -> Sample:
    """The elements `first`, then evenly spread ones, of a flattened array."""
    flat, head = array.ravel(), [int(i) for i in first]
    spread = np.linspace(0, flat.size - 1, _SAMPLES - len(head)).astype(np.int64)
    at = (*head, *(int(i) for i in spread))
    return Sample(array.shape, _short(_rms(array)), at, tuple(_short(flat[i]) for i in at))


def _short(value: float) -> float:
    """Six significant digits: rounding stays far below every limit."""
    return float(f"{float(value):.6g}")


def _plain(data: Any) -> Any:
    """Without kinds: nothing here is of one of several."""
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items() if key != "kind"}
    return [_plain(value) for value in data] if isinstance(data, list) else data


def _sha256(array: np.ndarray[Any, Any]) -> str:
    """Of an array's bytes in row-major order."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _rms(array: F32) -> float:
    """Root of the mean square."""
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64))))
