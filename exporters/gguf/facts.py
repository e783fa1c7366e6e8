"""What text.gguf and mmproj.gguf state about their model, in the words of llama.cpp's readers, as facts of a ModelSpec.

The table is the reader's own: it is not made from what metadata.py writes, so that a slip there shows.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlmedge.errors import BundleError
from vlmedge.exporters.gguf.metadata import first_token
from vlmedge.exporters.gguf.template import chat_template
from vlmedge.exporters.gguf.vocabulary import read_vocabulary
from vlmedge.runtimes.ggml_file import GgufFile
from vlmedge.spec import ModelSpec

VOCABULARY = "tokenizer.vocabulary"
# What a stock app reads beside it (src/llama-vocab.cpp); the template is Jinja.
_TOKENIZER = {
    "tokenizer.pre": "tokenizer.ggml.pre",
    "tokenizer.bos": "tokenizer.ggml.bos_token_id",
    "tokenizer.adds_bos": "tokenizer.ggml.add_bos_token",
    "tokenizer.eos": "tokenizer.ggml.eos_token_id",
    "tokenizer.chat_template": "tokenizer.chat_template",
}

# gguf_type -> layout (docs/gguf.md of ggml).
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9

# Field of DecoderSpec -> key, after the architecture's name (src/llama-arch.cpp).
_DECODER = {
    "context": "context_length",
    "width": "embedding_length",
    "mlp_width": "feed_forward_length",
    "layers": "block_count",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "norm_eps": "attention.layer_norm_epsilon",
    "rope_dims": "rope.dimension_count",
    "rope_theta": "rope.freq_base",
}
# What llama.cpp computes on seeing the architecture's name (src/models/NAME.cpp).
_GRAPHS: dict[str, dict[str, Any]] = {
    "phi2": {"norm": "layer", "activation": "gelu_tanh", "gated": False, "parallel_residual": True},
}
# Path into the ModelSpec -> key (tools/mtmd/clip-impl.h).
_VISION = {
    "vision.image_size": "clip.vision.image_size",
    "vision.patch_size": "clip.vision.patch_size",
    "vision.width": "clip.vision.embedding_length",
    "vision.heads": "clip.vision.attention.head_count",
    "vision.norm_eps": "clip.vision.attention.layer_norm_epsilon",
}


def read_facts(text: GgufFile, mmproj: GgufFile) -> dict[str, Any]:
    """Dotted path into the ModelSpec -> the value that the files state; None where they state none.

    `text` is the first part where there are several. Two come from what llama.cpp does with what it reads:
    `vision.layers` is the deepest layer that mtmd's graph computes, `decoder.vocab` the number of tokens. VOCABULARY
    is in no spec: see `tokenizer_facts`. Raises BundleError for damaged metadata and for an unknown architecture.
    """
    return _decoder_facts(text) | _vision_facts(mmproj)


def tokenizer_facts(spec: ModelSpec, tokenizer: bytes) -> dict[str, Any]:
    """What `read_facts` must say of the tokenizer and the prompt of this model. Raises as `read_vocabulary`."""
    found, bos = read_vocabulary(tokenizer, spec.decoder.vocab), first_token(spec.prompt)
    return {
        VOCABULARY: _digest(found.tokens, found.types, found.merges),
        "tokenizer.pre": found.pre,
        "tokenizer.bos": bos,
        "tokenizer.adds_bos": True,
        "tokenizer.eos": spec.prompt.stop[0],
        "tokenizer.chat_template": chat_template(spec.prompt, found, bos) or None,  # an empty one is not written
    }


def read_metadata(file: GgufFile) -> dict[str, Any]:
    """Every key of a GGUF file -> its value, arrays as lists; raises BundleError where the header is damaged."""
    try:
        return dict(_pairs(memoryview(file.data.data)))
    except (struct.error, ValueError, KeyError, OverflowError, MemoryError):
        raise BundleError(f"{file.path} is damaged: its metadata cannot be read; copy or export it again") from None


def _decoder_facts(file: GgufFile) -> dict[str, Any]:
    keys = read_metadata(file)
    name = keys.get("general.architecture")
    if not isinstance(name, str) or name not in _GRAPHS:
        said = name if isinstance(name, str) and name.isprintable() else ascii(name)
        raise BundleError(f"{file.path} is of the architecture {said:.80}; vlmedge writes {', '.join(_GRAPHS)}")
    tokens, types, merges = (keys.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges"))
    return (
        {f"decoder.{field}": keys.get(f"{name}.{key}") for field, key in _DECODER.items()}
        | {f"decoder.{field}": value for field, value in _GRAPHS[name].items()}
        # llama.cpp counts the tokens; it reads vocab_size only where a file has no tokenizer (src/llama-vocab.cpp).
        | {"decoder.vocab": len(tokens) if isinstance(tokens, list) else keys.get(f"{name}.vocab_size")}
        | {VOCABULARY: _digest(tokens, types, merges)}
        | {path: keys.get(key) for path, key in _TOKENIZER.items()}
    )


def _vision_facts(file: GgufFile) -> dict[str, Any]:
    keys = read_metadata(file)
    facts = {path: keys.get(key) for path, key in _VISION.items()}
    for part in ("mean", "std"):
        values = keys.get(f"clip.vision.image_{part}")
        facts[f"image.{part}"] = tuple(values) if isinstance(values, list) else values
    return facts | {"vision.layers": _layers(keys), "vision.activation": _activation(keys)}


def _layers(keys: Mapping[str, Any]) -> int | None:
    """Up to the deepest feature layer; without one the graph stops one block short (tools/mtmd/models/llava.cpp).

    None where a key is missing or is no number, or no list of numbers.
    """
    blocks, chosen = keys.get("clip.vision.block_count"), keys.get("clip.vision.feature_layer", [])
    if type(blocks) is not int or not isinstance(chosen, list) or any(type(layer) is not int for layer in chosen):
        return None
    deepest = max(chosen, default=-1)
    return blocks - 1 if deepest < 0 else min(deepest, blocks)


def _activation(keys: Mapping[str, Any]) -> str:
    """As mtmd chooses the tower's `ffn_op` (tools/mtmd/clip.cpp); FFN_GELU is ggml_gelu, the tanh form."""
    if keys.get("clip.use_gelu"):
        return "gelu_tanh"
    return "silu" if keys.get("clip.use_silu") else "quick_gelu"


def _digest(*arrays: object) -> str:
    return hashlib.sha256(json.dumps(arrays).encode()).hexdigest()


def _pairs(view: memoryview) -> list[tuple[str, Any]]:
    (count,), at = struct.unpack_from("<Q", view, 16), 24
    pairs = []
    for _ in range(count):
        (name,), at = _strings(view, at, 1)
        (kind,), at = struct.unpack_from("<I", view, at), at + 4
        if kind == _ARRAY:
            kind, length = struct.unpack_from("<IQ", view, at)
            value, at = _values(view, at + 12, kind, length)
        else:
            (value,), at = _values(view, at, kind, 1)
        pairs.append((name, value))
    return pairs


def _values(view: memoryview, at: int, kind: int, count: int) -> tuple[list[Any], int]:
    if kind == _STRING:
        return _strings(view, at, count)
    values = np.frombuffer(view, _SCALARS[kind], count, at)
    return values.tolist(), at + values.nbytes


def _strings(view: memoryview, at: int, count: int) -> tuple[list[Any], int]:
    """As many strings in a row: vocabularies have 100,000 and more, so no call per string."""
    length, strings = struct.Struct("<Q"), []
    for _ in range(count):
        start = at + 8
        at = start + length.unpack_from(view, at)[0]
        strings.append(str(view[start:at], "utf-8"))
    return strings, at
