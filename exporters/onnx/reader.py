"""An ONNX export read back: which stored array is which canonical tensor, by names, types and the nodes that read it.

The inverse of the exporter, without its builder: what a matrix is follows from the operator that reads it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from vlmedge.errors import BundleError
from vlmedge.exporters.base import Grain, Readback
from vlmedge.exporters.onnx.facts import config_facts, expected_facts, facts_of, flavour_in
from vlmedge.exporters.onnx.opened import GraphFile, StoredArray, attribute
from vlmedge.exporters.onnx.unpacking import StoredColumns, StoredFloats, StoredRows
from vlmedge.spec import ModelSpec, Shape
from vlmedge.tensors import RowSlice, Tensor

DECODER, PREFILL, EMBED = "decoder_model_merged", "decoder_prefill", "embed_tokens"
TABLE = "decoder.embed.weight"
HEADS = ("coord_encoder", "coord_decoder", "size_encoder", "size_decoder")
_AGAIN = "export it again"
_Parts = tuple[StoredArray, StoredArray | None, StoredArray | None]  # codes, scales, zeros


@dataclass(frozen=True, slots=True)
class Found:
    """One canonical tensor in one graph. `place`: data file, offset and first row, the same for the same bytes.

    `bytes`: its share of the stored arrays, by rows.
    """

    source: str
    graph: str
    place: tuple[Path, int, int]
    tensor: Tensor
    grain: Grain
    bytes: int


def read_graphs(spec: ModelSpec, folder: Path) -> Readback:
    """Open every graph of a bundle in `folder`; see `Exporter.read`. A fact that they must state and do not is None.

    A tensor has one entry for every place in which it is stored. Its plain name is the one in the decoder's graph,
    or where that has none, the first to be met; other bytes in the decoder's graph for prefill are `NAME#prefill`,
    any others `NAME#2`. So where a tied table is stored twice, its plain name is the head, and `decoder.embed.weight#2`
    the table that embed_tokens reads.
    """
    content = _content(spec)
    graphs = [GraphFile(folder / "onnx" / f"{name}.onnx") for name in content if name != PREFILL]
    if (prefill := folder / "onnx" / f"{PREFILL}.onnx").is_file():
        graphs.append(GraphFile(prefill))
    stored: dict[str, list[Found]] = {name: [] for name in spec.tensors()}
    for graph in graphs:
        for found in _complete(graph, _found(graph, spec.tensors()), content[graph.name]):
            if all(found.place != other.place for other in stored[found.source]):
                stored[found.source].append(found)
    named = {_name(found, i): found for copies in stored.values() for i, found in enumerate(copies)}
    return Readback(
        {name: found.tensor for name, found in named.items()},
        {name: found.grain for name, found in named.items()},
        {name: found.bytes for name, found in named.items()},
        expected_facts(spec, flavour_in(graphs))
        | facts_of({graph.name: graph for graph in graphs})
        | config_facts(folder),
    )


def _content(spec: ModelSpec) -> dict[str, set[str]]:
    """Graph -> the canonical tensors that it must hold."""
    names = spec.tensors()

    def under(*fronts: str) -> set[str]:
        return {name for name in names if name.startswith(fronts)}

    decoder = under("decoder.") - (set() if spec.decoder.tied_head else {TABLE})
    out = {DECODER: decoder, EMBED: {TABLE}, "vision_encoder": under("vision.")}
    out |= {"vision_projection": under("projector.")}
    for head in HEADS if spec.region else ():
        part, _, direction = head.partition("_")
        features = {f"region.{part}_features"} if direction == "encoder" else set()
        out[f"region_{head}"] = under(f"region.{head}.") | features
    return out | {PREFILL: decoder}


def _complete(graph: GraphFile, found: Iterable[Found], wanted: set[str]) -> Iterator[Found]:
    left = set(wanted)
    for one in found:
        if one.source not in left:
            why = "twice" if one.source in wanted else "which does not belong there"
            raise BundleError(f"{graph.path} holds {one.source}, {why}; {_AGAIN}")
        left.remove(one.source)
        yield one
    if left:
        more = f" and {len(left) - 1} more tensors" if len(left) > 1 else ""
        raise BundleError(f"{graph.path} lacks {min(left)}{more}; {_AGAIN}")


def _name(found: Found, number: int) -> str:
    if not number:
        return found.source
    return f"{found.source}#{'prefill' if found.graph == PREFILL else number + 1}"


def _found(graph: GraphFile, shapes: Mapping[str, Shape]) -> Iterator[Found]:
    """Every canonical tensor that a graph holds."""
    sizes: Counter[str] = Counter()
    for array in graph.arrays.values():
        base, role = _parted(array.name)
        sizes[base] += array.bytes if role != "kv_scale" else 0
    for array in graph.arrays.values():
        base, role = _parted(array.name)
        if role in ("scales", "zeros", "kv_scale"):
            continue
        sources = _sources(graph, base.removesuffix("#prefill"), shapes)
        tensor, grain = _matrix(graph, array, _stacked(graph, sources, shapes))
        at, whole = 0, sum(shapes[source][0] for source in sources)
        for source in sources:
            rows = shapes[source][0]
            piece = tensor if len(sources) == 1 else RowSlice(tensor, at, at + rows)
            share = sizes[base] * rows // whole
            yield Found(source, graph.name, (array.file, array.offset, at), piece, grain, share)
            at += rows


def _parted(name: str) -> tuple[str, str]:
    """`decoder.head.weight`, `codes` of `decoder.head.weight.codes`; no role for what is stored in one array."""
    base, _, role = name.rpartition(".")
    return (base, role) if role in ("codes", "scales", "zeros", "kv_scale") else (name, "")


def _sources(graph: GraphFile, name: str, shapes: Mapping[str, Shape]) -> tuple[str, ...]:
    """`decoder.layers.0.attn.q+k+v.weight` is three canonical tensors, one on top of the other."""
    front, _, leaf = name.rpartition(".")
    stem, _, middle = front.rpartition(".")
    sources = tuple(f"{stem}.{part}.{leaf}" for part in middle.split("+")) if "+" in middle else (name,)
    for source in sources:
        if source not in shapes:
            raise BundleError(f"{graph.path} holds {source!r:.120}, which this model does not have; {_AGAIN}")
    return sources


def _stacked(graph: GraphFile, sources: tuple[str, ...], shapes: Mapping[str, Shape]) -> Shape:
    rests = {shapes[source][1:] for source in sources}
    if len(rests) > 1:
        raise BundleError(f"{graph.path} stacks {' and '.join(sources)}, whose rows differ in length; {_AGAIN}")
    return (sum(shapes[source][0] for source in sources), *rests.pop())


def _matrix(graph: GraphFile, array: StoredArray, shape: Shape) -> tuple[Tensor, Grain]:
    """A stored tensor of this shape, by the first operator that says how its codes are meant."""
    if array.type in ("FLOAT", "FLOAT16"):
        array.expect(("FLOAT", "FLOAT16"), shape)
        return StoredFloats(array), Grain(32 if array.type == "FLOAT" else 16)
    if len(shape) == 2:
        for node, place in graph.readers(array.name):
            match node.op_type, place:
                case "MatMulNBits", 1:
                    return _blocks(graph, node, array, shape)
                case "DequantizeLinear", 0:
                    return _dequantized(graph, node, array, shape)
                case (("MatMulIntegerToFloat" | "MatMulInteger"), 1):
                    return _integers(graph, node, array, shape)
                case "Gather", 0:
                    return _table(graph, array, shape)
    ops = ", ".join(sorted({node.op_type for node, _ in graph.readers(array.name)})) or "nothing"
    raise BundleError(f"{graph.path}: {array.name} is {array.type} {list(array.shape)} for {ops}; {_AGAIN}")


def _blocks(graph: GraphFile, node: onnx.NodeProto, codes: StoredArray, shape: Shape) -> tuple[Tensor, Grain]:
    """Of MatMulNBits: rows of blocks."""
    (n, k), bits, block = shape, attribute(node, "bits", 4), attribute(node, "block_size", 0)
    if (attribute(node, "N", 0), attribute(node, "K", 0)) != (n, k) or bits not in (4, 8) or block <= 0:
        raise BundleError(f"{graph.path}: {node.name} has attributes that do not fit {codes.name}; {_AGAIN}")
    groups = -(-k // block)
    codes.expect(("UINT8",), (n, groups, block * bits // 8))
    return _rows(graph, shape, bits, block, (codes, graph.input_array(node, 2), graph.input_array(node, 3)))


def _table(graph: GraphFile, codes: StoredArray, shape: Shape) -> tuple[Tensor, Grain]:
    """Of Gather and what standard operators make of the rows: whole blocks, told by the number of scales."""
    (n, k), base = shape, codes.name.removesuffix(".codes")
    scales, zeros = graph.array(f"{base}.scales"), graph.arrays.get(f"{base}.zeros")
    groups = math.prod(scales.shape[1:]) or 1
    width = math.prod(codes.shape[1:])
    bits = 8 * width // k
    if k % groups or bits not in (4, 8) or width * 8 != bits * k:
        raise BundleError(f"{graph.path}: {codes.name} {list(codes.shape)} are no blocks of rows of {k}; {_AGAIN}")
    codes.expect(("UINT8",), (n, *codes.shape[1:]))
    return _rows(graph, shape, bits, k // groups, (codes, scales, zeros))


def _rows(graph: GraphFile, shape: Shape, bits: int, block: int, parts: _Parts) -> tuple[Tensor, Grain]:
    (n, k), (codes, scales, zeros) = shape, parts
    groups = -(-k // block)
    scales = _scales(graph, codes, scales, (n, groups))
    if zeros is not None:
        zeros.expect(("UINT8",), (n, -(-groups * bits // 8)))
    return StoredRows(shape, bits, block, codes, scales, zeros), Grain(bits, block)


def _dequantized(graph: GraphFile, node: onnx.NodeProto, codes: StoredArray, shape: Shape) -> tuple[Tensor, Grain]:
    """Of DequantizeLinear and MatMul: the matrix transposed, in blocks along its first axis."""
    (n, k), block = shape, attribute(node, "block_size", 0)
    if attribute(node, "axis", 1) != 0 or block <= 0:
        raise BundleError(f"{graph.path}: {node.name} does not dequantize {codes.name} in blocks of rows; {_AGAIN}")
    zeros, groups = graph.input_array(node, 2), -(-k // block)
    codes.expect(("INT4", "INT8", "UINT4", "UINT8"), (k, n))
    if zeros is not None:
        zeros.expect((codes.type,), (groups, n))
    scales = _scales(graph, codes, graph.input_array(node, 1), (groups, n))
    return StoredColumns(shape, block, codes, scales, zeros), Grain(4 if codes.type.endswith("4") else 8, block)


def _integers(graph: GraphFile, node: onnx.NodeProto, codes: StoredArray, shape: Shape) -> tuple[Tensor, Grain]:
    """Of products of integers: the matrix transposed, a scale for each of its columns."""
    whole = node.op_type == "MatMulIntegerToFloat"
    if graph.input_array(node, 5 if whole else 3) is not None:
        raise BundleError(f"{graph.path}: {node.name} gives {codes.name} a zero point; {_AGAIN}")
    (n, k), beside = shape, f"{codes.name.removesuffix('.codes')}.scales"
    codes.expect(("INT8",), (k, n))
    scales = _scales(graph, codes, graph.input_array(node, 3) if whole else graph.array(beside), (n,))
    return StoredColumns(shape, k, codes, scales, None), Grain(8)


def _scales(graph: GraphFile, codes: StoredArray, scales: StoredArray | None, shape: Shape) -> StoredArray:
    if scales is None:
        raise BundleError(f"{graph.path}: {codes.name} has no scales; {_AGAIN}")
    scales.expect(("FLOAT", "FLOAT16"), shape)
    return scales
