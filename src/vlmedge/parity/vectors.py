"""Self-test vectors: what an app must reproduce on the device, recorded from the bundle's own runtime."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from vlmedge import imaging
from vlmedge.parity.pictures import FORMULA, pattern, sizes
from vlmedge.parity.stages import caption_length, prompt_ids
from vlmedge.prompt import Tokenizer
from vlmedge.session import F32
from vlmedge.skills import Model
from vlmedge.spec import ImageSpec, ModelSpec

SCHEMA = "vlmedge.selftest/1"
_SAMPLES = 32
_TOP = 8
_TOKENS = 16
_TEXTS = (
    "What colour is the cat?", "how many people are there", "Describe this image.", "a red circle", " leading blank",
    "trailing blank ", "two  blanks", "tabs\tand\nnew lines\r\n", "", "0123456789", "3.14159, 1e-5; 50%", "don't we'll I'm",
    "snake_case camelCase UPPER", "for (int i = 0; i < n; ++i) { x[i] += 1; }", "https://example.org/a?b=c&d=e#f",
    "naïve café Ünïcödé", "Ελληνικά", "русский текст", "العربية", "עברית", "हिन्दी", "中文字符测试", "日本語のテキスト", "한국어",
    "emoji 😀👍🏽🇩🇪", "e\u0301 combining", "\u200bzero width", "<|endoftext|>", "<b>bold</b>", "a" * 40,
)  # fmt: skip


def text_vectors(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Texts of many kinds and pairs of them, each with its ids."""
    texts = [*_TEXTS, *(f"{a} {b}" for a, b in zip(_TEXTS, _TEXTS[7:] + _TEXTS[:7], strict=True))]
    texts += [f"{text}{end}" for text in _TEXTS for end in ("?", "\n\n", " 42", "🙂", "'s", ":", "  x", "。", ")")]
    return [{"text": text, "ids": tokenizer.encode(text)} for text in texts]


def picture_vectors(spec: ImageSpec) -> list[dict[str, Any]]:
    """Preprocessing: size, hash of the raw RGB bytes, tiling, hash of each crop's bytes."""
    out = []
    for height, width in sizes(spec):
        picture = pattern(height, width)
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


def record(spec: ModelSpec, tokenizer: Tokenizer, model: Model | None) -> dict[str, Any]:
    """All vectors; without a model only those that need none (crops and token ids)."""
    pictures = picture_vectors(spec.image)
    if model is not None:
        for entry in pictures:
            entry["model"] = _model_vectors(model, entry["height"], entry["width"])
    return {
        "schema": SCHEMA,
        "pixels": FORMULA,
        "pictures": pictures,
        "text": text_vectors(tokenizer),
        "recorded_with": None if model is None else model.session.runtime,
    }


def _model_vectors(model: Model, height: int, width: int) -> dict[str, Any]:
    picture, ids = pattern(height, width), prompt_ids(model)
    stages = model.stages([picture], ids)
    last = stages["logits"][-1]
    top = np.argsort(-last, kind="stable")[:_TOP]
    answer = model.caption(picture, caption_length(model), max_tokens=_TOKENS)
    return {
        "features": _sample(stages["features"]),
        "projected": _sample(stages["projected"]),
        "prompt_ids": ids,
        "logits": {"ids": top.tolist(), "values": [_short(v) for v in last[top]]},
        "tokens": list(answer.tokens),
        "text": answer.text,
    }


def _sample(array: F32) -> dict[str, Any]:
    """Evenly spread elements of a flattened array, and its RMS."""
    flat = array.ravel()
    at = np.linspace(0, flat.size - 1, _SAMPLES).astype(np.int64)
    rms = float(np.sqrt(np.mean(np.square(flat, dtype=np.float64))))
    return {"shape": list(array.shape), "rms": _short(rms), "at": at.tolist(), "values": [_short(v) for v in flat[at]]}


def _short(value: float) -> float:
    """Four significant digits: what two machines agree on."""
    return float(f"{float(value):.4g}")
