"""Self-test vectors: what an app must reproduce on the device, recorded from the bundle's own runtime."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from vlmedge import imaging
from vlmedge.parity import pictures
from vlmedge.parity.trace import Reading, Trace, caption_ids
from vlmedge.prompt import Tokenizer
from vlmedge.session import F32
from vlmedge.spec import ImageSpec, ModelSpec

SCHEMA = "vlmedge.selftest/1"
_SAMPLES = 32
_TOP = 8
_TEXTS = (
    "What colour is the cat?", "how many people are there", "Describe this image.", "a red circle", " leading blank",
    "trailing blank ", "two  blanks", "tabs\tand\nnew lines\r\n", "", "0123456789", "3.14159, 1e-5; 50%",
    "don't we'll I'm", "snake_case camelCase UPPER", "for (int i = 0; i < n; ++i) { x[i] += 1; }",
    "https://example.org/a?b=c&d=e#f", "naïve café Ünïcödé", "Ελληνικά", "русский текст", "العربية", "עברית",
    "हिन्दी", "中文字符测试", "日本語のテキスト", "한국어", "emoji 😀👍🏽🇩🇪", "e\u0301 combining", "\u200bzero width",
    "<|endoftext|>", "<b>bold</b>", "a" * 40,
)  # fmt: skip
_ENDS = ("?", "\n\n", " 42", "🙂", "'s", ":", "  x", "。", ")")


def text_vectors(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Texts of many kinds, in pairs and with endings, each with its ids."""
    pairs = (f"{a} {b}" for a, b in zip(_TEXTS, _TEXTS[7:] + _TEXTS[:7], strict=True))
    texts = [*_TEXTS, *pairs, *(f"{text}{end}" for text in _TEXTS for end in _ENDS)]
    return [{"text": text, "ids": tokenizer.encode(text)} for text in texts]


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


def record(spec: ModelSpec, tokenizer: Tokenizer, runtime: str | None, found: Trace | None) -> dict[str, Any]:
    """All vectors; without a trace (and the runtime that made it) only those that need none: crops and token ids."""
    vectors: dict[str, Any] = {
        "schema": SCHEMA,
        "pixels": pictures.PIXELS,
        "pictures": picture_vectors(spec.image),
        "text": text_vectors(tokenizer),
        "recorded_with": runtime,
    }
    if found is not None:
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
