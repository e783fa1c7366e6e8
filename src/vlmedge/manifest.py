"""Describing an export: everything that `vlmedge.json` says, from what was planned and what was written."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vlmedge import __version__
from vlmedge.bundle import (
    SCHEMA,
    ComponentEntry,
    FileEntry,
    Manifest,
    MemoryEntry,
    ProfileEntry,
    SourceEntry,
    TokenizerEntry,
)
from vlmedge.contract import image_contract, prompt_contract
from vlmedge.exporters import Encoding, Order
from vlmedge.loading import Described, source_label
from vlmedge.prompt import skills
from vlmedge.quant_profiles import QuantProfile
from vlmedge.spec import COMPONENTS, DecoderSpec, ModelSpec, component

_WRITERS = ("gguf", "libggml-python", "llama-cpp-python", "onnx", "onnx-ir", "onnxruntime")
_KV_BYTES = {"f32": 4, "f16": 2, "int8": 1}


def describe_bundle(
    found: Described,
    profile: QuantProfile,
    format: str,
    order: Order,
    encodings: Mapping[str, Encoding],
    files: tuple[FileEntry, ...],
    licence: str,
    notes: Mapping[str, Any],
    hashes: Mapping[str, str],
    tokenizer_file: str,
) -> Manifest:
    """Return the manifest of an export that has not been verified yet."""
    spec, source = found.spec, found.checkpoint.source
    components = component_entries(spec, encodings)
    parameters, stored = sum(c.parameters for c in components), sum(c.bytes for c in components)
    return Manifest(
        schema=SCHEMA,
        producer=_producer(),
        model=spec,
        format=format,
        source=SourceEntry(source_label(found.checkpoint), source.repo, source.revision, source.commit, dict(hashes)),
        licence=licence,
        profile=ProfileEntry(
            profile.name,
            profile.digest,
            parameters,
            _bits(stored, parameters),
            order.kv_cache,
            profile.limits_for(format),
        ),
        components=components,
        files=files,
        image=image_contract(spec.image),
        prompt=prompt_contract(spec),
        tokenizer=tokenizer_entry(found.tokenizer, tokenizer_file),
        skills=skills(spec.prompt),
        requires=dict(notes.get("requires") or {}),
        memory=memory_entry(spec.decoder, components, order.kv_cache),
        stock=tuple(notes.get("stock") or ()),
        verification={"verified": False, "reason": "the export is not finished"},
        notes=tuple(notes.get("notes") or ()),
        flavour=order.flavour,
    )


def component_entries(spec: ModelSpec, encodings: Mapping[str, Encoding]) -> tuple[ComponentEntry, ...]:
    """Parameters, bytes and storage types of every component."""
    shapes = spec.tensors()
    out = []
    for name in COMPONENTS:
        own = [e for key, e in encodings.items() if component(key) == name]
        if not own:
            continue
        parameters = sum(math.prod(shape) for key, shape in shapes.items() if component(key) == name)
        types: Counter[str] = Counter()
        for encoding in own:
            types[encoding.type] += encoding.bytes
        stored = sum(types.values())
        files = tuple(sorted({e.file for e in own}))
        out.append(
            ComponentEntry(name, files, parameters, stored, _bits(stored, parameters), dict(types.most_common()))
        )
    return tuple(out)


def memory_entry(decoder: DecoderSpec, components: tuple[ComponentEntry, ...], kv_cache: str) -> MemoryEntry:
    """Bytes of weights by component and of the KV cache."""
    position = 2 * decoder.layers * decoder.kv_heads * decoder.head_dim * _KV_BYTES[kv_cache]
    return MemoryEntry({c.name: c.bytes for c in components}, position, position * decoder.context)


def tokenizer_entry(content: bytes, file: str) -> TokenizerEntry:
    """The tokenizer's facts; the pre-tokenizer is named by its parts, as apps must implement them."""
    data = json.loads(content)
    vocabulary = data.get("model", {}).get("vocab") or {}
    ids = [*vocabulary.values()] if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
    ids += [token["id"] for token in data.get("added_tokens") or []]
    return TokenizerEntry(file, pre_tokenizer_name(data.get("pre_tokenizer")), max(ids, default=-1) + 1)


def pre_tokenizer_name(part: Any) -> str:
    """Name it: "gpt2" for the byte-level one with its own pattern, "none", or the parts' types joined."""
    if not part:
        return "none"
    if part.get("type") == "ByteLevel":
        return "gpt2" if part.get("use_regex", True) and not part.get("add_prefix_space") else "bytes"
    if part.get("type") == "Sequence":
        return "+".join(pre_tokenizer_name(p) for p in part.get("pretokenizers") or [])
    return str(part.get("type", "unknown")).lower()


def _producer() -> dict[str, str]:
    out = {"vlmedge": __version__}
    for package in _WRITERS:
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            continue
    return out


def _bits(stored: int, parameters: int) -> float:
    return round(stored * 8 / parameters, 3) if parameters else 0.0
