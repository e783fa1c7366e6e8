"""The GGUF exporter: encodings without weights, and one pass over the checkpoint that fills every file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from vlmedge.errors import RuntimeFailedError, UnsupportedError
from vlmedge.exporters.base import Encoding, ExportJob, Order, Readback, Written
from vlmedge.exporters.gguf import quantizer
from vlmedge.exporters.gguf.facts import tokenizer_facts
from vlmedge.exporters.gguf.heads import heads_metadata
from vlmedge.exporters.gguf.layout import Stored, layout, piece, role_of
from vlmedge.exporters.gguf.metadata import (
    architecture,
    check_vision,
    mmproj_metadata,
    parts_metadata,
    text_metadata,
)
from vlmedge.exporters.gguf.reader import read_back
from vlmedge.exporters.gguf.stream import write_files
from vlmedge.exporters.gguf.vocabulary import Vocabulary, read_vocabulary
from vlmedge.quant_profiles import KvCache
from vlmedge.spec import ModelSpec

REQUIRES = {"llama-cpp-python": ">=0.3.36", "llama.cpp": "the one in that version, or newer"}
# Where the facts of `ExportJob.about` go; any other is written as general.source.NAME.
ABOUT = {"licence": "general.license", "license": "general.license", "repo": "general.source.huggingface.repository"}


class GgufExporter:
    """Writes text.gguf, mmproj.gguf and, where there is something to put into it, heads.gguf."""

    format = "gguf"
    flavours = ("",)
    default_profile = "q4"

    def missing(self) -> str | None:
        """Why this format cannot be written here, or None: all but f32 and f16 need ggml's quantizer."""
        try:
            quantizer.load(quantizer.library_path())
        except RuntimeFailedError as error:
            return str(error)
        return None

    def kv_cache(self, wanted: KvCache, flavour: str) -> KvCache:
        """What llama.cpp keeps; its 8-bit caches are not used, they save memory and are slower."""
        return "f32" if wanted == "f32" else "f16"

    def encodings(self, order: Order) -> dict[str, Encoding]:
        """Canonical name -> how it would be stored; reads no weights.

        The joined projector's first layer is stored in two pieces, the second under `projector.up.weight#local`.
        Raises UnsupportedError where llama.cpp has no such block or ggml no such type, and for a second copy.
        """
        stored = _stored(order)
        return {piece(s): Encoding(s.file, s.tensor, s.kind.name, s.shape, s.bytes, s.note) for s in stored}

    def write(self, job: ExportJob) -> tuple[Written, ...]:
        """Write the files into `job.out`, reading each tensor once, in the order of the checkpoint's files.

        Raises UnsupportedError as `encodings`, CheckpointError for weights that are not finite, OSError where
        writing fails, RuntimeFailedError without ggml's quantizer.
        """
        stored = _stored(job.order)
        metadata = _metadata(job, stored, read_vocabulary(job.tokenizer, job.order.spec.decoder.vocab))
        if any(s.kind.quantized for s in stored):
            quantizer.load(quantizer.library_path())
        write_files(job, stored, metadata)
        return tuple(Written(file, role_of(file)) for file in metadata)

    def read(self, spec: ModelSpec, folder: Path) -> Readback:
        """Open text.gguf or its parts, mmproj.gguf and heads.gguf; types and shapes are the files' own.

        Raises BundleError as `read_back`, and where padding that is read is not zero.
        """
        return read_back(spec, folder)

    def tokenizer_facts(self, spec: ModelSpec, tokenizer: bytes) -> dict[str, Any]:
        """The vocabulary, special tokens and chat template as stock apps read them."""
        return tokenizer_facts(spec, tokenizer)

    def notes(self, order: Order, tokenizer: bytes) -> dict[str, Any]:
        """Facts for the manifest: `requires`, `stock` (what a stock app gets) and `notes`, both as sentences."""
        vocabulary = read_vocabulary(tokenizer, order.spec.decoder.vocab)
        return {
            "requires": REQUIRES,
            "stock": _stock(order.spec),
            "notes": vocabulary.notes,
        }


def _stored(order: Order) -> tuple[Stored, ...]:
    architecture(order.spec.decoder)
    check_vision(order.spec)
    if order.prefill:
        raise UnsupportedError("gguf has one copy of the decoder for prefill and decoding; drop the [[prefill]] rules")
    return layout(order.spec, order.plan, order.max_part)


def _metadata(job: ExportJob, stored: tuple[Stored, ...], vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """File -> its key-value pairs, in the order in which they are written."""
    spec = job.order.spec
    text: dict[str, Any] = {"general.architecture": architecture(spec.decoder), "general.type": "model"}
    mmproj: dict[str, Any] = {"general.architecture": "clip", "general.type": "mmproj"}
    heads = heads_metadata()
    about = {ABOUT.get(key, f"general.source.{key}"): value for key, value in sorted(job.about.items()) if value}
    out: dict[str, dict[str, Any]] = {}
    for role, first, rest in (
        ("text", text, text_metadata(spec, vocabulary)),
        ("mmproj", mmproj, mmproj_metadata(spec, job.order.plan)),
        ("heads", heads, {}),
    ):
        kinds: Counter[int] = Counter()
        files: Counter[str] = Counter()
        for s in stored:
            if role_of(s.file) == role:
                files[s.file] += 1
                kinds[s.kind.file_type] += s.parameters if len(s.shape) > 1 else 0
        if kinds:
            general = {"general.name": job.name, "general.file_type": max(kinds, key=lambda k: (kinds[k], -k))}
            whole: dict[str, Any] = first | general | {"general.quantization_version": 2} | about | rest
            out |= dict(zip(files, parts_metadata(whole, list(files.values())), strict=True))
    return out


def _stock(spec: ModelSpec) -> tuple[str, ...]:
    words = ["A stock llama.cpp app (mtmd) loads text.gguf and mmproj.gguf and answers through its chat template."]
    if spec.projector.joins_global:
        words.append("It sees a picture as one crop, letterboxed and resized bicubically, without overlapping crops.")
    if spec.decoder.bidirectional_prefix:
        words.append("Its image positions attend causally; the model was trained with all of them seeing each other.")
    if spec.region is not None:
        words.append("It cannot detect or point: those heads are in heads.gguf.")
    return tuple(words)


EXPORTER = GgufExporter()
