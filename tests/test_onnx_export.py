"""ONNX files: where every byte lies, what graphs declare, the same bytes every time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from tests.onnx_tools import (
    FLAVOURS,
    GOLDEN,
    Array,
    export,
    graphs,
    job_of,
    made_up,
    opened,
    order_of,
    places,
    random_tensors,
    relative,
    row_bytes,
)
from vlmedge.exporters import EXPORTERS, ExportJob, Order, passing
from vlmedge.exporters.choice import choose
from vlmedge.exporters.onnx import stream
from vlmedge.exporters.onnx.files import build
from vlmedge.exporters.onnx.kinds import KINDS
from vlmedge.loading import describe
from vlmedge.quant_profiles import Scheme, load_profile, plan, profiles_for
from vlmedge.reference.session import TorchSession
from vlmedge.runtimes.onnxruntime_session import OnnxSession
from vlmedge.tensors import ArrayTensor, Tensor

PROFILES = profiles_for("onnx")
WAYS = [(profile, flavour) for profile in PROFILES for flavour in FLAVOURS]


class Golden:
    """Exports of the golden checkpoint, each made once."""

    def __init__(self, folder: Path) -> None:
        self.found, self._folder = describe(GOLDEN), folder
        self._done: dict[tuple[str, str], Path] = {}

    def order(self, profile: str, flavour: str = "ort") -> Order:
        return choose("onnx", profile, flavour).order(self.found.spec)

    def job(self, order: Order, out: Path, **changes: Any) -> ExportJob:
        out.mkdir(exist_ok=True)
        return ExportJob(order, self.found.tensors, self.found.tokenizer, "tiny", out, **{"threads": 2, **changes})

    def export(self, profile: str, flavour: str = "ort") -> Path:
        key = profile, flavour
        if key not in self._done:
            out = self._folder / "-".join(key)
            EXPORTERS["onnx"].write(self.job(self.order(*key), out))
            self._done[key] = out
        return self._done[key]


@pytest.fixture(scope="module")
def golden_model(tmp_path_factory) -> Golden:
    return Golden(tmp_path_factory.mktemp("onnx"))


@pytest.mark.parametrize(("profile", "flavour"), WAYS)
def test_the_plan_is_what_is_written(golden_model, profile, flavour):
    """Bytes of every tensor, and of every file: nothing overlaps, nothing lies in between but alignment."""
    order, folder = golden_model.order(profile, flavour), golden_model.export(profile, flavour) / "onnx"
    encodings, spec = EXPORTERS["onnx"].encodings(order), golden_model.found.spec
    assert {name.partition("#")[0] for name in encodings} == set(spec.tensors())
    assert all(e.shape == spec.tensors()[name.partition("#")[0]] for name, e in encodings.items())
    models = graphs(folder)
    found = {(name, place) for model in models.values() for name, place in places(model).items()}
    spans = sorted({(p.file, p.offset, p.length) for _, p in found})
    scales = sum(place.length for name, place in found if name.endswith("kv_scale"))
    assert scales == (4 * 2 * 3 * 2 * 64 if order.kv_cache == "int8" else 0)
    assert sum(e.bytes for e in encodings.values()) == sum(length for *_, length in spans) - scales
    names = {(name.removesuffix(".table"), place.file) for name, place in found}
    assert {(e.tensor, e.file.removeprefix("onnx/")) for e in encodings.values()} <= names
    for file in {file for file, *_ in spans}:
        end = 0
        for _, offset, length in (span for span in spans if span[0] == file):
            assert offset % 64 == 0
            assert end <= offset < end + 64
            end = offset + length
        assert end == (folder / file).stat().st_size
    assert {file for file, *_ in spans} == {path.name for path in folder.glob("*data*")}


def test_large_arrays_begin_on_pages(tmp_path):
    spec = made_up({"mlp_width": 4200})
    folder = export(order_of(spec), random_tensors(spec), tmp_path)
    found = sorted(places(graphs(folder)["decoder_model_merged"]).values(), key=lambda p: p.offset)
    large = [p for p in found if p.length >= 1 << 20]
    assert len(large) == 4
    end = 0
    for p in found:
        step = 1 << 16 if p in large else 64
        assert p.offset % step == 0
        assert end <= p.offset < end + step
        end = p.offset + p.length


@pytest.mark.parametrize(("profile", "flavour"), [("f32", "ort"), ("turbo", "ort"), ("q4", "portable")])
def test_large_files_are_cut_and_compute_the_same(golden_model, tmp_path, profile, flavour):
    most, whole = 100_000, golden_model.order(profile, flavour)
    order = replace(whole, max_part=most)
    EXPORTERS["onnx"].write(golden_model.job(order, tmp_path))
    folder = tmp_path / "onnx"
    for name in graphs(folder):
        parts = sorted(path.name for path in folder.glob(f"{name}.onnx_data*"))
        wanted_names = [f"{name}.onnx_data", *(f"{name}.onnx_data_{i}" for i in range(1, len(parts)))]
        assert parts == sorted(wanted_names[: len(parts)])
        assert all((folder / part).stat().st_size > 0 for part in parts)
    assert len(list(folder.glob("decoder_model_merged.onnx_data*"))) > 3
    found = {p for model in graphs(folder).values() for p in places(model).values()}
    single = {p.file for p in found if p.length > most}
    assert all(p.offset == 0 for p in found if p.length > most)
    assert all(path.stat().st_size <= most for path in folder.glob("*data*") if path.name not in single)
    encodings = EXPORTERS["onnx"].encodings
    assert sum(e.bytes for e in encodings(order).values()) == sum(e.bytes for e in encodings(whole).values())
    counts = json.loads((tmp_path / "config.json").read_text())["transformers.js_config"]["use_external_data_format"]
    assert counts == {n: c for n in graphs(folder) if (c := len(list(folder.glob(f"{n}.onnx_data*"))))}
    ids, logits = np.array([0, 1, 300, 2, 9, 8, 7, 6, 5, 4], np.int32), []
    for out in (tmp_path, golden_model.export(profile, flavour)):
        session = OnnxSession(golden_model.found.spec, out, threads=1)
        logits.append(session.forward(ids, every=True).logits)
        session.close()
    assert np.array_equal(*logits)


def nodes_of(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Nodes of a graph and of the graphs in their attributes."""
    inner = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return [*graph.node, *(node for sub in inner for node in nodes_of(sub))]


@pytest.mark.parametrize(("profile", "flavour"), WAYS)
def test_graphs_are_valid_onnx(golden_model, profile, flavour):
    """Shape inference, which the full check adds, knows no contrib operators."""
    folder = golden_model.export(profile, flavour) / "onnx"
    for path in folder.glob("*.onnx"):
        onnx.checker.check_model(path, full_check=flavour == "portable")
        model = onnx.load(path, load_external_data=False)
        domains = {entry.domain: entry.version for entry in model.opset_import}
        used = {node.domain for node in nodes_of(model.graph)}
        if flavour == "portable":
            assert (domains, used) == ({"": 23}, {""})
        else:
            assert domains == {"": 21, "com.microsoft": 1}
            assert used <= {"", "com.microsoft"}
        assert (model.ir_version, model.producer_name) == (10, "vlmedge")
        names = [node.name for node in nodes_of(model.graph)]
        assert len(set(names)) == len(names)


def test_files_are_those_of_the_contract(golden_model):
    heads = {f"region_{part}_{way}" for part in ("coord", "size") for way in ("encoder", "decoder")}
    stages = {"vision_encoder", "vision_projection", "embed_tokens", "decoder_model_merged"}
    for profile, flavour in WAYS:
        out = golden_model.export(profile, flavour)
        extra = {"decoder_prefill"} if profile == "turbo" else set()
        assert set(graphs(out / "onnx")) == stages | heads | extra
        configs = {"config.json", "generation_config.json", "preprocessor_config.json", "tokenizer_config.json"}
        assert {path.name for path in out.iterdir()} == {"onnx"} | configs


def test_what_was_written_is_reported(golden_model, tmp_path):
    written = EXPORTERS["onnx"].write(golden_model.job(golden_model.order("turbo"), tmp_path))
    assert {w.path for w in written} == {
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()
    }
    assert len({w.path for w in written}) == len(written)
    roles = {Path(w.path).name.partition(".")[0]: w.role for w in written if w.path.startswith("onnx/")}
    assert roles.pop("decoder_prefill") == roles.pop("decoder_model_merged") == roles.pop("embed_tokens") == "text"
    assert roles.pop("vision_encoder") == roles.pop("vision_projection") == "vision"
    assert set(roles.values()) == {"heads"}


def signature(path: Path) -> tuple[dict[str, tuple[str, list[Any]]], dict[str, tuple[str, list[Any]]]]:
    session = opened(path)
    inputs, outputs = (
        {node.name: (node.type.removeprefix("tensor").strip("()"), node.shape) for node in nodes}
        for nodes in (session.get_inputs(), session.get_outputs())
    )
    return inputs, outputs


@pytest.mark.parametrize(("profile", "flavour"), [("f32", "ort"), ("f32", "portable"), ("turbo", "ort")])
def test_inputs_and_outputs_are_those_of_the_contract(golden_model, profile, flavour):
    folder, tokens = golden_model.export(profile, flavour) / "onnx", 729
    assert signature(folder / "vision_encoder.onnx") == (
        {"pixel_values": ("float", ["num_crops", 3, 378, 378])},
        {"image_features": ("float", ["num_crops", tokens, 48])},
    )
    assert signature(folder / "vision_projection.onnx") == (
        {
            "image_features": ("float", ["num_crops", tokens, 48]),
            "stitch_index": ("int64", ["grid_rows", "grid_columns"]),
            "pool_rows": ("float", [27, "grid_rows"]),
            "pool_columns": ("float", [27, "grid_columns"]),
        },
        {"image_embeds": ("float", [1, tokens, 128])},
    )
    assert signature(folder / "embed_tokens.onnx") == (
        {"input_ids": ("int64", [1, "sequence_length"])},
        {"inputs_embeds": ("float", [1, "sequence_length", 128])},
    )
    sides = {"coord_encoder": (1, 128), "size_encoder": (2, 128)}
    sides |= {"coord_decoder": (128, 1024), "size_decoder": (128, 2048)}
    for head, (n, m) in sides.items():
        assert signature(folder / f"region_{head}.onnx") == (
            {"input": ("float", [1, n])}, {"output": ("float", [1, m])},
        )  # fmt: skip
    kept, parts = "int8" if profile == "turbo" else "float", [f"{i}.{p}" for i in range(3) for p in ("key", "value")]
    for name in ("decoder_model_merged", *(["decoder_prefill"] if profile == "turbo" else [])):
        inputs, outputs = signature(folder / f"{name}.onnx")
        assert inputs == {
            "inputs_embeds": ("float", [1, "sequence_length", 128]),
            "attention_mask": ("int64", [1, "total_sequence_length"]),
            **{f"past_key_values.{p}": (kept, [1, 2, "past_sequence_length", 64]) for p in parts},
        }
        assert list(outputs)[:2] == ["logits", "hidden"]
        assert outputs == {
            "logits": ("float", [1, "num_logits", 512]),
            "hidden": ("float", [1, 1, 128]),
            **{f"present.{p}": (kept, [1, 2, "present_sequence_length", 64]) for p in parts},
        }


@pytest.mark.parametrize(("profile", "flavour"), WAYS)
def test_defaults_can_be_overridden_and_facts_are_told(golden_model, profile, flavour):
    folder = golden_model.export(profile, flavour) / "onnx"
    for path in folder.glob("decoder_*.onnx"):
        model = onnx.load(path, load_external_data=False)
        defaults = {node.name: (node.type, node.shape) for node in opened(path).get_overridable_initializers()}
        assert defaults == {name: ("tensor(int64)", []) for name in ("num_logits_to_keep", "prefix_len")}
        values = {t.name: int(onnx.numpy_helper.to_array(t)) for t in model.graph.initializer if t.name in defaults}
        assert values == {"num_logits_to_keep": 1, "prefix_len": -730}
        kept = golden_model.order(profile, flavour).kv_cache
        assert {entry.key: entry.value for entry in model.metadata_props} == {
            "vlmedge.kv": "growing" if flavour == "portable" else "shared", "vlmedge.kv_type": kept,
        }  # fmt: skip
    causal = build(order_of(made_up({"bidirectional_prefix": False}))).graphs[0]
    assert [value.name for value in causal.inputs if value.const_value is not None] == ["num_logits_to_keep"]


def test_a_tied_head_is_stored_once(tmp_path):
    """One table of bytes in one file; each graph sees it in the shape that it needs."""
    spec = made_up({"tied_head": True})
    table = "decoder.embed.weight"
    schemes = [Scheme("int", 4, 32), Scheme("int", 4, 32, False), Scheme("float", 16), Scheme("int", 8, activations=8)]
    for scheme in schemes:
        order = order_of(spec, {table: scheme})
        out = tmp_path / str(schemes.index(scheme))
        folder = export(order, random_tensors(spec), out)
        models = graphs(folder)
        seen = [
            {p for name, p in places(models[graph]).items() if name.startswith("decoder.embed.weight")}
            for graph in ("embed_tokens", "decoder_model_merged")
        ]
        assert seen[0] == seen[1]
        assert {p.file for p in seen[0]} == {"decoder_model_merged.onnx_data"}
        encoding = EXPORTERS["onnx"].encodings(order)[table]
        assert sum(p.length for p in seen[0]) == encoding.bytes == 96 * row_bytes(KINDS[encoding.type], 64)
        assert bool(encoding.note) == (scheme.activations > 0)
        session, ids = OnnxSession(spec, out, threads=1), np.arange(20, dtype=np.int32)
        rows = session.embed(np.arange(96, dtype=np.int32))
        same = {**random_tensors(spec), table: ArrayTensor(rows)}
        want = TorchSession(spec, same, threads=1).forward(ids, every=True).logits
        assert relative(session.forward(ids, every=True).logits, want) < 1e-2  # the rows' rounding to 8 bits


def test_a_tied_head_of_standard_operators_is_noted_as_two(tmp_path):
    spec = made_up({"tied_head": True})
    order = order_of(spec, {"decoder.embed.weight": Scheme("int", 8, 32)}, flavour="portable")
    encoding = EXPORTERS["onnx"].encodings(order)["decoder.embed.weight"]
    assert encoding.bytes == 2 * 96 * row_bytes(KINDS["int8_32"], 64)
    assert "also as int8_32 in onnx/embed_tokens.onnx_data" in encoding.note
    floats = EXPORTERS["onnx"].encodings(order_of(spec, flavour="portable"))["decoder.embed.weight"]
    assert (floats.bytes, floats.note) == (4 * 96 * 64, "")


def test_where_a_tied_table_lies_is_told_to_other_apps():
    """Standard operators read integers in another layout, so that embed_tokens has a table of its own."""
    spec, table = made_up({"tied_head": True}), "decoder.embed.weight"
    for flavour, bits, shared in (("ort", 8, True), ("ort", 4, True), ("portable", 16, True), ("portable", 8, False)):
        scheme = Scheme("float", 16) if bits == 16 else Scheme("int", bits, 32)
        order = order_of(spec, {table: scheme}, flavour=flavour)
        weights = [w for w in build(order).store.weights.values() if w.sources == (table,)]
        assert (len(weights) == 1) == shared
        stock = " ".join(EXPORTERS["onnx"].notes(order, b"")["stock"])
        assert ("decoder_model_merged.onnx_data, where transformers.js does not look." in stock) == shared
        assert ("transformers.js and optimum answer" in stock) == (spec.projector.joins_global and not shared)


def test_prefill_has_its_own_layers_and_nothing_else(golden_model):
    folder = golden_model.export("turbo") / "onnx"
    models = graphs(folder)
    decoder, prefill = (places(models[name]) for name in ("decoder_model_merged", "decoder_prefill"))
    own = {name for name, place in prefill.items() if place.file == "decoder_prefill.onnx_data"}
    assert own == {name for name in prefill if ".attn." in name or ".mlp." in name} - {
        name for name in prefill if name.endswith((".bias", "kv_scale"))
    }
    assert all("#prefill" in name for name in own)
    assert {name: place for name, place in prefill.items() if name not in own}.items() <= decoder.items()
    assert {"decoder.norm.weight", "decoder.head.weight.codes", "decoder.layers.0.norm1.bias"} <= prefill.keys() - own
    encodings = EXPORTERS["onnx"].encodings(golden_model.order("turbo"))
    twice = {name.partition("#")[0] for name in encodings if "#prefill" in name}
    layers = [name for name in golden_model.found.spec.tensors() if name.startswith("decoder.layers.")]
    assert twice == {name for name in layers if name.endswith(".weight") and ".norm" not in name}
    assert {encodings[f"{name}#prefill"].type for name in twice} == {"w8a8"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(("profile", "flavour"), WAYS)
def test_the_same_input_gives_the_same_bytes(golden_model, tmp_path, profile, flavour):
    EXPORTERS["onnx"].write(golden_model.job(golden_model.order(profile, flavour), tmp_path, threads=5))
    assert contents(tmp_path) == contents(golden_model.export(profile, flavour))


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("profile", ["f16", "q8", "w8a8"])
def test_blocks_of_rows_give_the_bytes_of_whole_tensors(golden_model, tmp_path, monkeypatch, profile, flavour):
    """At 4 bits the search adds up errors in an order that depends on the block, and ties fall either way."""
    monkeypatch.setattr(passing, "UNIT", 1000)
    EXPORTERS["onnx"].write(golden_model.job(golden_model.order(profile, flavour), tmp_path))
    assert contents(tmp_path) == contents(golden_model.export(profile, flavour))


def test_a_system_without_pwrite_gives_the_same_bytes(golden_model, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_POSITIONAL", False)  # as on Windows
    EXPORTERS["onnx"].write(golden_model.job(golden_model.order("q4"), tmp_path))
    assert contents(tmp_path) == contents(golden_model.export("q4"))


def test_each_tensor_is_read_once_in_blocks_and_told(golden_model, tmp_path):
    reads: dict[str, int] = {}
    largest, seen = [0], []

    class Watched(ArrayTensor):
        def __init__(self, name: str, array: Array) -> None:
            super().__init__(array)
            self.name = name

        def read_rows(self, start: int, stop: int) -> npt.NDArray[np.float32]:
            reads[self.name] = reads.get(self.name, 0) + (stop - start) * self.columns
            largest[0] = max(largest[0], (stop - start) * self.columns)
            return super().read_rows(start, stop)

    spec = made_up({"vocab": 40_000})
    tensors: dict[str, Tensor] = {n: Watched(n, t.read()) for n, t in random_tensors(spec).items()}
    order = order_of(spec, plan(load_profile("turbo"), spec))
    EXPORTERS["onnx"].write(job_of(order, tensors, tmp_path, progress=lambda name, n: seen.append((name, n))))
    assert reads == {name: tensor.size for name, tensor in tensors.items()}
    assert 0 < largest[0] <= passing.UNIT
    assert seen == [(name, tensor.size) for name, tensor in tensors.items()]


def test_what_differs_from_the_plan_is_noted(golden_model):
    encodings = EXPORTERS["onnx"].encodings(golden_model.order("q8"))
    notes = {name: (e.type, e.note) for name, e in encodings.items() if e.note}
    assert notes == {"vision.patch.weight": ("f16", "a convolution's kernel has no w8a8 form")}
    tables = {"decoder.embed.weight": Scheme("int", 4)}  # rows of 64, blocks of 128
    for tied in (False, True):
        encodings = EXPORTERS["onnx"].encodings(order_of(made_up({"tied_head": tied}), tables))
        assert encodings["decoder.embed.weight"].note == "rows of 64 have no blocks of 128"


def test_notes_say_what_other_apps_get(golden_model):
    for flavour in FLAVOURS:
        notes = EXPORTERS["onnx"].notes(golden_model.order("w8a8", flavour), golden_model.found.tokenizer)
        assert "onnxruntime" in notes["requires"]
        assert any("other runtimes" in sentence for sentence in notes["stock"]) == (flavour == "ort")
        assert any("crops" in sentence for sentence in notes["stock"])
        assert not any("does not look" in sentence for sentence in notes["stock"])
    assert EXPORTERS["onnx"].missing() is None
