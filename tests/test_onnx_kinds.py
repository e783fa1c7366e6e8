"""Every kind of weight in ONNX: products are those of the decoded weights, which are GGUF's where both have them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir
import pytest

from tests.onnx_tools import (
    FLAVOURS,
    GOLDEN,
    TINY,
    Array,
    Place,
    job_of,
    opened,
    order_of,
    relative,
    row_bytes,
    run,
    stored,
)
from vlmedge.exporters import EXPORTERS, ExportJob
from vlmedge.exporters.choice import choose
from vlmedge.exporters.onnx import files, stream
from vlmedge.exporters.onnx.files import Built, build
from vlmedge.exporters.onnx.flavour import flavour_of
from vlmedge.exporters.onnx.graph import F32, I64, Graph
from vlmedge.exporters.onnx.kinds import KINDS, Kind, wanted
from vlmedge.exporters.onnx.linear import embedding, linear
from vlmedge.exporters.onnx.store import Store
from vlmedge.loading import describe
from vlmedge.quant_profiles import Scheme
from vlmedge.quant_profiles.grids import Codes, Grid, decode, encode
from vlmedge.tensors import ArrayTensor, Tensor


class Alone:
    """A graph of one product (or one table) with its data, in a folder."""

    def __init__(
        self, folder: Path, flavour: str, kinds: Mapping[str, str], arrays: Mapping[str, Array], table: str = ""
    ) -> None:
        shapes = {name: array.shape for name, array in arrays.items()}
        store = Store(shapes)
        g = Graph("alone", flavour_of(flavour), store, {name: KINDS[kind] for name, kind in kinds.items()})
        if table:
            out = embedding(g, g.input("ids", I64, (1, "n")), table)
        else:
            names = [name.removesuffix(".weight") for name in arrays if name.endswith(".weight")]
            out = linear(g, g.input("x", F32, ("n", shapes[f"{names[0]}.weight"][1])), *names)
        g.output(out, "out", F32, (1, "n", "m") if table else ("n", "m"))
        tensors: dict[str, Tensor] = {name: ArrayTensor(array) for name, array in arrays.items()}
        job = job_of(order_of(TINY), tensors, folder)
        (folder / "onnx").mkdir()
        self.store, self.folder = store, folder / "onnx"
        stream.write_data(job, Built((g,), store, files._placed(store, 1 << 40)))
        self.path = self.folder / "alone.onnx"
        self.path.write_bytes(onnx_ir.to_proto(g.model("test", "0")).SerializeToString())

    def __call__(self, **feeds: Array) -> Array:
        return run(opened(self.path), **feeds)["out"]


def exact_rows(columns: int, rows: int = 5) -> npt.NDArray[np.float32]:
    """Whole numbers up to 127, which every block of 32 holds: 8-bit activations are these rows themselves."""
    x = np.random.default_rng(2).integers(-126, 127, (rows, columns)).astype(np.float32)
    x[:, ::32] = 127
    return x


def weights(rows: int, columns: int, seed: int = 3) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_t(4, (rows, columns)).astype(np.float32)


def as_stored(matrix: npt.NDArray[np.float32], kind: Kind) -> npt.NDArray[np.float64]:
    """What a kind makes of a matrix, by the shared quantizer."""
    if kind.floating:
        return np.float64(matrix.astype(np.float16) if kind.bits == 16 else matrix)
    return np.float64(decode(encode(matrix, kind.grid), kind.grid))


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(24, 64), (7, 33), (40, 72), (24, 140), (16, 300)])
def test_a_product_is_that_of_the_decoded_weights(tmp_path, kind, flavour, rows, columns):
    matrix, bias = weights(rows, columns), weights(1, rows)[0]
    product = Alone(tmp_path, flavour, {"a.weight": kind}, {"a.weight": matrix, "a.bias": bias})
    want = as_stored(matrix, KINDS[kind]).T
    x = exact_rows(columns)
    assert relative(product(x=x), x @ want + bias) < 2e-6
    near = np.random.default_rng(4).standard_normal((50, columns)).astype(np.float32)
    # Rounding to 8 bits: a row's largest value is 127 steps, here about 3 times its spread.
    assert relative(product(x=near), near @ want + bias) < (2e-6 if KINDS[kind].floating else 1.5e-2)


@pytest.mark.parametrize("kind", ["int4_32", "uint4_128", "int8_32"])
def test_blocks_are_multiplied_as_integers(tmp_path, kind):
    """Without accuracy_level 4 ONNX Runtime takes 2 to 3 times as long for one row."""
    product = Alone(tmp_path, "ort", {"a.weight": kind}, {"a.weight": weights(8, 64)})
    (node,) = (node for node in onnx.load(product.path).graph.node if node.op_type == "MatMulNBits")
    assert {a.name: a.i for a in node.attribute}["accuracy_level"] == 4


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(
    "kinds",
    [("w8a8", "w8a8", "w8a8"), ("int4_32", "int4_32", "int4_32"), ("uint4_32", "uint4_32", "int8_32"),
     ("f16", "f32", "f16"), ("w8a8", "int4_128", "w8a8")],
    ids="-".join,
)  # fmt: skip
@pytest.mark.parametrize("biased", [True, False])
def test_stacked_matrices_are_one_product_where_their_kinds_are_one(tmp_path, flavour, kinds, biased):
    arrays: dict[str, Array] = {}
    for i, (part, rows) in enumerate(zip("qkv", (48, 16, 16), strict=True)):
        arrays[f"at.{part}.weight"] = weights(rows, 72, i)
        arrays |= {f"at.{part}.bias": weights(1, rows, 9 + i)[0]} if biased else {}
    names = [f"at.{part}.weight" for part in "qkv"]
    product = Alone(tmp_path, flavour, dict(zip(names, kinds, strict=True)), arrays)
    matrix = np.concatenate([as_stored(arrays[n], KINDS[k]) for n, k in zip(names, kinds, strict=True)])
    bias = np.concatenate([arrays[f"at.{part}.bias"] for part in "qkv"]) if biased else 0.0
    x = exact_rows(72)
    assert relative(product(x=x), x @ matrix.T + bias) < 2e-6
    matrices = [weight.name for weight in product.store.weights.values() if weight.name.endswith("weight")]
    assert matrices == (["at.q+k+v.weight"] if len(set(kinds)) == 1 else names)
    ops = {node.op_type for node in onnx.load(product.path).graph.node}
    assert ("Concat" in ops) == (len(set(kinds)) > 1)


def test_rows_are_rounded_once_for_all_that_read_them(tmp_path):
    arrays = {f"at.{part}.weight": weights(8, 64) for part in "qk"}
    kinds = {"at.q.weight": "w8a8", "at.k.weight": "w8a8"}
    mixed = Alone(tmp_path / "b", "ort", kinds | {"at.v.weight": "f32"}, arrays | {"at.v.weight": weights(8, 64)})
    ops = [node.op_type for node in onnx.load(mixed.path).graph.node]
    assert (ops.count("QuantizeLinear"), ops.count("MatMulIntegerToFloat")) == (1, 2)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(
    ("kind", "width", "kept"),
    [
        ("f32", 72, "f32"), ("f16", 72, "f16"), ("w8a8", 96, "int8_32"), ("w8a8", 72, "f16"),
        ("int8_64", 128, "int8_64"), ("int4_32", 96, "int4_32"), ("uint4_32", 96, "uint4_32"),
        ("uint4_128", 256, "uint4_128"), ("int4_128", 256, "int4_128"), ("int4_128", 96, "f16"),
        ("uint4_64", 72, "f16"),
    ],
)  # fmt: skip
def test_a_table_gives_the_decoded_rows(tmp_path, flavour, kind, width, kept):
    """By standard operators in both flavours: builds for browsers lack GatherBlockQuantized."""
    matrix = weights(50, width)
    table = Alone(tmp_path, flavour, {"t.weight": kind}, {"t.weight": matrix}, table="t.weight")
    (weight,) = table.store.weights.values()
    assert weight.kind.name == kept
    assert bool(weight.note) == (kept != kind)
    ids = np.array([[49, 0, 7, 7]])
    assert relative(table(ids=ids)[0], as_stored(matrix, weight.kind)[ids[0]]) < 1e-7
    assert {node.domain for node in onnx.load(table.path).graph.node} == {""}


def test_schemes_have_kinds():
    said = {
        Scheme("float", 32): "f32", Scheme("float", 16): "f16", Scheme("int", 8, activations=8): "w8a8",
        Scheme("int", 4, activations=8): "w8a8", Scheme("int", 4, 32): "int4_32", Scheme("int", 4): "int4_128",
        Scheme("int", 4, 32, symmetric=False): "uint4_32", Scheme("int", 5, 48): "int8_64",
        Scheme("int", 8, 16, symmetric=False): "int8_32", Scheme("int", 4, 256): "int4_128",
        Scheme("int", 3, native={"onnx": "int4_64"}): "int4_64", Scheme("int", 4, native={"gguf": "Q4_K"}): "int4_128",
    }  # fmt: skip
    assert {wanted(scheme).name for scheme in said} == set(said.values())
    for scheme, kind in said.items():
        assert wanted(scheme).name == kind, scheme


@pytest.mark.parametrize("kind", KINDS.values(), ids=str)
@pytest.mark.parametrize("columns", [32, 72, 140, 2048])
def test_bytes_of_a_row_are_those_that_are_stored(kind, columns):
    store = Store({"a.weight": (6, columns)})
    weight = store.weight("g", ("a.weight",), kind)
    assert sum(section.bytes for section in weight.sections.values()) == 6 * row_bytes(kind, columns)


def ours_and_ggufs(tmp_path: Path, profile: str, kind: str) -> dict[str, tuple[Codes, Array, Array]]:
    """Canonical matrix of a kind of that name -> our codes, GGUF's values, the source; of the golden checkpoint."""
    found = describe(GOLDEN)
    folders = {name: tmp_path / name for name in ("gguf", "onnx")}
    for format_, out in folders.items():
        out.mkdir()
        order = choose(format_, profile).order(found.spec)
        job = ExportJob(order, found.tensors, found.tokenizer, "tiny", out, threads=1)
        EXPORTERS[format_].write(job)
    theirs = EXPORTERS["gguf"].encodings(choose("gguf", profile).order(found.spec))
    readers = {path.name: gguf.GGUFReader(path) for path in folders["gguf"].glob("*.gguf")}
    values = {
        (file, t.name): gguf.quants.dequantize(t.data, t.tensor_type)
        for file, reader in readers.items()
        for t in reader.tensors
    }
    built = build(choose("onnx", profile).order(found.spec))
    out = {}
    for weight in built.store.weights.values():
        if weight.kind.name != kind:
            continue
        codes, scales = (part_of(folders["onnx"] / "onnx", weight.sections[r]) for r in ("codes", "scales"))
        for source, start, rows in weight.pieces():
            part = slice(start, start + rows)
            theirs_of = values[theirs[source].file, theirs[source].tensor].reshape(found.spec.tensors()[source])
            flat = unpacked(codes[part], weight.kind)[:, : weight.columns]
            out[source] = Codes(flat, scales[part], None), theirs_of, found.tensors[source].read()
    return out


def part_of(folder: Path, section: Any) -> Array:
    place = Place(section.file, section.offset, section.bytes)
    return stored(folder, place, section.dtype.numpy(), section.shape)


def unpacked(codes: npt.NDArray[np.uint8], kind: Kind) -> npt.NDArray[np.uint8]:
    """Codes uint8 [n, k] of rows of blocks."""
    if kind.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1)
    return codes.reshape(len(codes), -1)


def test_q8_is_ggufs_to_the_last_bit(tmp_path):
    compared = ours_and_ggufs(tmp_path, "q8", "int8_32")
    shapes = describe(GOLDEN).spec.tensors()
    assert set(compared) == {n for n, shape in shapes.items() if n.startswith("decoder.") and len(shape) > 1}
    for name, (codes, theirs, _) in compared.items():
        assert np.array_equal(decode(codes, Grid(8, 32)), theirs), name


def test_q4_0_is_on_ggufs_grid_and_nearer(tmp_path):
    """Our codes and scales as ggml's blocks mean the same values; the search never loses to ggml's rounding."""
    compared = ours_and_ggufs(tmp_path, "q4_0", "int4_32")
    assert len(compared) == 3 * 6 + 1
    for name, (codes, theirs, source) in compared.items():
        ours, blocks = decode(codes, Grid(4, 32)), codes.codes.reshape(-1, 32)
        packed = np.concatenate(
            [codes.scales.reshape(-1, 1).view(np.uint8), blocks[:, :16] | (blocks[:, 16:] << 4)], axis=1
        )
        as_ggml = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_0).reshape(ours.shape)
        assert np.array_equal(as_ggml, ours), name
        errors = [np.square(np.float64(v) - source).reshape(-1, 32).sum(1) for v in (ours, theirs)]
        assert (errors[0] <= errors[1] * (1 + 1e-5)).all(), name
        assert errors[0].sum() < 0.95 * errors[1].sum(), name
