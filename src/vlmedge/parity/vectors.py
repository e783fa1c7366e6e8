"""Self-test vectors: what an app must reproduce on the device, recorded from the bundle's own runtime."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from vlmedge import imaging
from vlmedge.parity import pictures
from vlmedge.parity.examine import Ran
from vlmedge.parity.texts import TEXTS
from vlmedge.parity.trace import Reading, Trace, caption_ids
from vlmedge.prompt import Tokenizer
from vlmedge.session import F32
from vlmedge.spec import ImageSpec, ModelSpec

SCHEMA = "vlmedge.selftest/1"
_SAMPLES = 32
_TOP = 8


def text_vectors(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Texts of many kinds, each with its ids."""
    return [{"text": text, "ids": tokenizer.encode(text)} for text in TEXTS]


def picture_vectors(spec: ImageSpec) -> list[dict[str, Any]]:
    """Preprocessing: size, hash of the raw RGB bytes, tiling, hash of each crop's bytes."""
    out = []
    for height, width in pictures.sizes(spec):
        picture = pictures.pattern(height, width)
        crops = imaging.crop(picture, spec)
        out.append(
            {
                "height": height,
                "width": width,
                "rgb_sha256": hashlib.sha256(picture.tobytes()).hexdigest(),
                "tiling": list(crops.tiling),
                "crops_sha256": [hashlib.sha256(crop.tobytes()).hexdigest() for crop in crops.pixels],
            }
        )
    return out


def record(spec: ModelSpec, tokenizer: Tokenizer, ran: Ran | None) -> dict[str, Any]:
    """All vectors; of a bundle that could not be run here only those that need no model: crops and token ids."""
    vectors: dict[str, Any] = {
        "schema": SCHEMA,
        "pixels": pictures.PIXELS,
        "pictures": picture_vectors(spec.image),
        "text": text_vectors(tokenizer),
        "recorded_with": None if ran is None else ran.runtime,
    }
    if ran is not None:
        found = ran.trace
        vectors["model"] = {
            "prompt_ids": list(caption_ids(spec.prompt)[1]),
            "features": {"picture": 0, "crop": 0, **_sample(found.features)},
            "local_features": {"picture": 1, "crop": 1, **_sample(found.local)},
            "small": {"input": "picture 0", **_reading(found.small, tokenizer)},
            "stitched": {"input": f"features in the tiling of picture 1: {pictures.FEATURES}"}
            | _reading(found.stitched, tokenizer),
            "regions": _regions(found, spec.decoder.width),
        }
    return vectors


def _reading(reading: Reading, tokenizer: Tokenizer) -> dict[str, Any]:
    top = np.argsort(-reading.logits, kind="stable")[:_TOP]
    return {
        "projected": _sample(reading.projected),
        "logits": {"ids": top.tolist(), "values": [_short(v) for v in reading.logits[top]]},
        "tokens": list(reading.tokens),
        "text": tokenizer.decode(reading.tokens),
    }


def _regions(found: Trace, width: int) -> dict[str, Any]:
    """Each region head: its input in words or numbers, and samples of what it returns; empty where there are none."""
    out: dict[str, Any] = {}
    inputs = pictures.region_inputs(width)
    for name, values in found.regions.items():
        decodes = name.endswith("decoder")
        given = f"hidden of {width}: {pictures.FEATURES}" if decodes else [_short(v) for v in inputs[name]]
        out[name] = {"input": given, **_sample(values)}
        if decodes:
            out[name]["bins"] = [int(b) for b in values.reshape(1 + (name == "size_decoder"), -1).argmax(axis=1)]
    return out


def _sample(array: F32) -> dict[str, Any]:
    """Evenly spread elements of a flattened array, and its RMS."""
    flat = array.ravel()
    at = np.linspace(0, flat.size - 1, _SAMPLES).astype(np.int64)
    rms = float(np.sqrt(np.mean(np.square(flat, dtype=np.float64))))
    return {"shape": list(array.shape), "rms": _short(rms), "at": at.tolist(), "values": [_short(v) for v in flat[at]]}


def _short(value: float) -> float:
    """Four significant digits: what two machines agree on."""
    return float(f"{float(value):.4g}")
