"""The ONNX exporter: encodings without weights, and one pass over the checkpoint that fills every data file."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmedge import __version__
from vlmedge.exporters.base import Encoding, ExportJob, Order, Readback, Written
from vlmedge.exporters.onnx.flavour import FLAVOURS, Flavour, flavour_of, kv_type
from vlmedge.quant_profiles import KvCache
from vlmedge.spec import ModelSpec

if TYPE_CHECKING:
    from vlmedge.exporters.onnx.store import Weight

# 1.30 is the first with GroupQueryAttention's attribute `causal`; 1.24 runs what has standard operators only.
REQUIRES = {"ort": {"onnxruntime": ">=1.30"}, "portable": {"onnx": "opset 23", "onnxruntime": ">=1.24"}}
ROLES = {"decoder_model_merged": "text", "decoder_prefill": "text", "embed_tokens": "text"}


class OnnxExporter:
    """Writes a folder `onnx` of graphs with external data, and the configs that other libraries look for."""

    format = "onnx"
    flavours: tuple[str, ...] = FLAVOURS
    default_profile = "w8a8"

    def missing(self) -> str | None:
        """Why this format cannot be written here, or None."""
        gone = [name for name in ("onnx", "onnx_ir") if importlib.util.find_spec(name) is None]
        return f"{' and '.join(gone)} not installed: pip install onnx onnx-ir" if gone else None

    def kv_cache(self, wanted: KvCache, flavour: str) -> KvCache:
        """Keys and values are f32, or int8 where the profile says so and the flavour has it."""
        return kv_type(wanted, flavour_of(flavour))

    def encodings(self, order: Order) -> dict[str, Encoding]:
        """Canonical name -> how it would be stored; reads no weights.

        The copy for prefill has its entries under `NAME#prefill`.
        Raises UnsupportedError for a scheme that ONNX has no kind for.
        """
        from vlmedge.exporters.onnx.files import build

        stored: dict[str, Encoding] = {}
        for weight in build(order).store.weights.values():
            for source, _, rows in weight.pieces():
                key = source + ("#prefill" if weight.prefill else "")
                stored[key] = _merged(stored.get(key), _encoding(weight, source, rows, order.spec))
        return {key: stored[key] for name in order.spec.tensors() for key in (name, f"{name}#prefill") if key in stored}

    def write(self, job: ExportJob) -> tuple[Written, ...]:
        """Write the files into `job.out`, reading each tensor once, in the order of the checkpoint's files.

        Raises UnsupportedError as `encodings`, CheckpointError for weights that are not finite, OSError where writing
        fails.
        """
        import onnx_ir as ir

        from vlmedge.exporters.onnx.consumers import configs
        from vlmedge.exporters.onnx.files import FOLDER, build
        from vlmedge.exporters.onnx.stream import write_data

        built = build(job.order)
        folder = job.out / FOLDER
        folder.mkdir()
        write_data(job, built)
        out = [Written(f"{FOLDER}/{name}", _role(name)) for name in built.sizes]
        for graph in built.graphs:
            proto = ir.to_proto(graph.model("vlmedge", __version__))
            (folder / f"{graph.name}.onnx").write_bytes(proto.SerializeToString())
            out.append(Written(f"{FOLDER}/{graph.name}.onnx", _role(graph.name)))
        parts = Counter(name.partition(".")[0] for name in built.sizes)
        for name, text in configs(job.order.spec, job.tokenizer, parts).items():
            (job.out / name).write_text(text, encoding="utf-8")
            out.append(Written(name, "config"))
        return tuple(out)

    def read(self, spec: ModelSpec, folder: Path) -> Readback:
        """Open the graphs in `folder`/onnx; values are read when they are asked for.

        A tied table that is stored twice has its second copy under `NAME#2`, see reader.py. Raises BundleError for
        files that are missing, damaged or of another model.
        """
        from vlmedge.exporters.onnx.reader import read_graphs

        return read_graphs(spec, folder)

    def tokenizer_facts(self, spec: ModelSpec, tokenizer: bytes) -> dict[str, Any]:
        """None: the graphs hold no vocabulary, every app reads tokenizer.json."""
        return {}

    def notes(self, order: Order, tokenizer: bytes) -> dict[str, Any]:
        """Facts for the manifest: `requires`, `stock` (what other libraries get) and `notes`, as sentences."""
        flavour = flavour_of(order.flavour)
        return {"requires": REQUIRES[flavour], "stock": _stock(order, flavour), "notes": _notes(order)}


def _encoding(weight: Weight, source: str, rows: int, spec: ModelSpec) -> Encoding:
    """One source's share of a stored weight."""
    whole = sum(section.bytes for section in weight.sections.values())
    main = weight.sections.get("codes") or weight.sections["values"]
    share = whole * rows // weight.rows
    return Encoding(f"onnx/{main.file}", main.name, weight.kind.name, spec.tensors()[source], share, weight.note)


def _merged(before: Encoding | None, now: Encoding) -> Encoding:
    """A tensor that is stored twice, in two kinds, counts both."""
    if before is None:
        return now
    note = "; ".join(filter(None, (before.note, f"also as {now.type} in {now.file}")))
    return Encoding(before.file, before.tensor, before.type, before.shape, before.bytes + now.bytes, note)


def _role(file: str) -> str:
    graph = file.partition(".")[0]
    return ROLES.get(graph, "heads" if graph.startswith("region") else "vision")


def _stock(order: Order, flavour: Flavour) -> tuple[str, ...]:
    from vlmedge.exporters.onnx.files import build

    words = ["onnx/ holds vision_encoder, vision_projection, embed_tokens and decoder_model_merged for any ONNX app."]
    if flavour == "ort":
        words.append("They use ONNX Runtime's own operators; other runtimes need --flavour portable.")
    # A tied table is stored once where both graphs read the same bytes: with the decoder.
    shared = order.spec.decoder.tied_head and not any(file.startswith("embed_tokens.") for file in build(order).sizes)
    if shared:
        where = "decoder_model_merged.onnx_data, where transformers.js does not look"
        words.append(f"embed_tokens reads its table from {where}.")
    if order.spec.projector.joins_global:
        words.append("A picture's crops, their stitch_index and pooling matrices are the app's to make: see image.")
        who = "optimum answers" if shared else "transformers.js and optimum answer"
        words.append(f"{who} to text with the files alone; a picture needs the steps above.")
    return tuple(words)


def _notes(order: Order) -> tuple[str, ...]:
    words = []
    if kv_type(order.kv_cache, flavour_of(order.flavour)) == "int8":
        words.append("Keys and values are int8, with scales that were set from the weights alone, not from pictures.")
    if order.prefill:
        words.append("decoder_prefill is decoder_model_merged in other weights, for calls of many positions.")
    return tuple(words)


EXPORTER = OnnxExporter()
