"""A graph file as it is found: its nodes, and its stored arrays by their places; nothing of the writer is used."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from vlmedge.errors import BundleError
from vlmedge.session import U8
from vlmedge.spec import Shape

_BITS = {"FLOAT": 32, "FLOAT16": 16, "INT8": 8, "UINT8": 8, "INT4": 4, "UINT4": 4}
_NUMPY = {"FLOAT": "<f4", "FLOAT16": "<f2", "INT8": "i1", "UINT8": "u1"}
_UNPACKED = 1 << 22  # codes of 4 bits that are unpacked at once
_AGAIN = "export it again"
Array = npt.NDArray[Any]
Dim = int | str
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StoredArray:
    """An array in a data file: `type` by ONNX's name ("FLOAT16", "UINT4"), `offset` in bytes.

    The file is mapped anew for every read, so that nothing stays resident.
    """

    name: str
    type: str
    shape: Shape
    file: Path
    offset: int

    @property
    def bytes(self) -> int:
        """Bytes of its data; two 4-bit values share one, across rows too."""
        return math.ceil(math.prod(self.shape) * _BITS[self.type] / 8)

    def rows(self, start: int, stop: int) -> Array:
        """A copy of entries start..stop of the first axis; of 8-bit and wider types only."""
        return np.array(self._mapped().view(_NUMPY[self.type]).reshape(self.shape)[start:stop])

    def columns(self, start: int, stop: int) -> Array:
        """A copy of columns start..stop of a matrix [k, n], 4-bit values as int8 or uint8."""
        if _BITS[self.type] > 4:
            return np.array(self._mapped().view(_NUMPY[self.type]).reshape(self.shape)[:, start:stop])
        codes = self._packed_columns(start, stop)
        return codes if self.type == "UINT4" else (codes ^ np.uint8(8)).view(np.int8) - np.int8(8)

    def expect(self, types: Iterable[str], shape: Shape) -> None:
        """Raise BundleError for another type or shape."""
        if self.type not in types or self.shape != shape:
            raise BundleError(
                f"{self.file}: {self.name} is {self.type} {list(self.shape)}, not {' or '.join(types)} {list(shape)}; "
                f"{_AGAIN}"
            )

    def _mapped(self) -> U8:
        try:
            return np.memmap(self.file, np.uint8, "r", self.offset, (self.bytes,))
        except (OSError, ValueError) as error:
            raise BundleError(f"{self.file} cannot be read at {self.name}: {line(error)}; {_AGAIN}") from None

    def _packed_columns(self, start: int, stop: int) -> U8:
        (k, n), raw = self.shape, self._mapped()
        if n % 2 == 0:
            first = start // 2
            pairs = nibbles(raw.reshape(k, n // 2)[:, first : -(-stop // 2)])
            return pairs[:, start - 2 * first : stop - 2 * first]
        out, step = np.empty((k, stop - start), np.uint8), max(2, _UNPACKED // n // 2 * 2)
        for at in range(0, k, step):  # every other row begins in the middle of a byte
            end = min(k, at + step)
            flat = nibbles(raw[at * n // 2 : -(-end * n // 2)])
            out[at:end] = flat[: (end - at) * n].reshape(-1, n)[:, start:stop]
        return out


class GraphFile:
    """One graph. `inputs` and `outputs`: name -> dimensions; `nodes`: all, those of subgraphs too."""

    def __init__(self, path: Path) -> None:
        """Read the graph without its data. Raises BundleError for one that is missing, damaged or lacks its data."""
        graph = _loaded(path).graph
        self.path, self.name = path, path.stem
        self.nodes = tuple(_nodes(graph))
        if not all(isinstance(text, str) for text in _texts(graph, self.nodes)):  # bytes, where it is not UTF-8
            raise BundleError(f"{path} is damaged: it has names that are not UTF-8; {_AGAIN}")
        self.inputs, self.outputs = _values(graph.input), _values(graph.output)
        self.arrays: dict[str, StoredArray] = {}
        self._inline: dict[str, onnx.TensorProto] = {}
        for tensor in graph.initializer:
            if tensor.name in self.arrays or tensor.name in self._inline:
                raise BundleError(f"{path} holds {tensor.name!r:.80} twice; {_AGAIN}")
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                self.arrays[tensor.name] = _stored(path, tensor)
            else:
                self._inline[tensor.name] = tensor
        casts = [node for node in self.nodes if node.op_type == "Cast" and node.input and node.output]
        self._casts = {node.output[0]: node.input[0] for node in casts}
        self._readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        for node in self.nodes:
            for place, name in enumerate(node.input):
                self._readers.setdefault(name, []).append((node, place))

    def readers(self, name: str) -> list[tuple[onnx.NodeProto, int]]:
        """The nodes that read a value, and as which of their inputs."""
        return self._readers.get(name, [])

    def array(self, name: str) -> StoredArray:
        """The stored array of this name. Raises BundleError where there is none."""
        if name not in self.arrays:
            raise BundleError(f"{self.path} lacks {name!r:.120}; {_AGAIN}")
        return self.arrays[name]

    def input_array(self, node: onnx.NodeProto, place: int) -> StoredArray | None:
        """The stored array that a node reads as input `place`, itself or cast; None where it has no such input."""
        name = node.input[place] if place < len(node.input) else ""
        return self.array(self._casts.get(name, name)) if name else None

    def constant(self, name: str) -> Array | None:
        """A constant that is kept in the graph itself, or None."""
        tensor = self._inline.get(name)
        try:
            return None if tensor is None else np.asarray(onnx.numpy_helper.to_array(tensor))
        except (ValueError, TypeError) as error:
            raise BundleError(f"{self.path} has a damaged constant {name!r:.80}: {line(error)}; {_AGAIN}") from None


def attribute(node: onnx.NodeProto, name: str, default: T) -> T:
    """The value of a node's attribute, or the default where it has none of the default's type (text is bytes)."""
    entry = next((entry for entry in node.attribute if entry.name == name), None)
    try:
        value: Any = None if entry is None else onnx.helper.get_attribute_value(entry)
    except ValueError:  # an attribute of no type
        return default
    return value if type(value) is type(default) else default


def nibbles(codes: U8) -> U8:
    """The 4-bit codes of bytes, along the last axis; the low half is the first."""
    out = np.empty((*codes.shape[:-1], codes.shape[-1] * 2), np.uint8)
    np.bitwise_and(codes, np.uint8(15), out=out[..., 0::2])
    np.right_shift(codes, np.uint8(4), out=out[..., 1::2])
    return out


def line(error: Exception) -> str:
    """An error's text on one readable line."""
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:200]


def _loaded(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise BundleError(f"{path} is missing; {_AGAIN}")
    try:
        return onnx.load(path, load_external_data=False)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {line(error)}") from None
    except DecodeError as error:
        raise BundleError(f"{path} is damaged: {line(error)}; {_AGAIN}") from None


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for entry in node.attribute:
            if entry.HasField("g"):
                yield from _nodes(entry.g)


def _texts(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> Iterator[object]:
    yield from (info.name for info in (*graph.input, *graph.output))
    for tensor in graph.initializer:
        yield tensor.name
        yield from (text for entry in tensor.external_data for text in (entry.key, entry.value))
    yield from (text for node in nodes for text in (node.op_type, node.name, *node.input, *node.output))


def _values(infos: Iterable[onnx.ValueInfoProto]) -> dict[str, tuple[Dim, ...]]:
    return {info.name: tuple(d.dim_param or d.dim_value for d in info.type.tensor_type.shape.dim) for info in infos}


def _stored(path: Path, tensor: onnx.TensorProto) -> StoredArray:
    """Where an array lies, checked against the data file."""
    facts = {entry.key: entry.value for entry in tensor.external_data}
    what = f"{path}: {tensor.name!r:.120}"
    kind = {number: name for name, number in onnx.TensorProto.DataType.items()}.get(tensor.data_type, "")
    if kind not in _BITS or any(n < 0 for n in tensor.dims):
        raise BundleError(f"{what} has the type {kind or tensor.data_type} {list(tensor.dims)}; {_AGAIN}")
    file = _data_file(path, what, facts.get("location", ""))
    offset = _count(what, "offset", facts.get("offset", "0"))
    array = StoredArray(tensor.name, kind, tuple(tensor.dims), file, offset)
    length = _count(what, "length", facts.get("length", str(array.bytes)))
    if length != array.bytes:
        raise BundleError(f"{what} is {kind} {list(array.shape)}, {array.bytes} bytes, but {length} are kept; {_AGAIN}")
    if offset + length > file.stat().st_size:
        raise BundleError(f"{file} ends in the middle of {tensor.name!r:.120}; copy the bundle again")
    return array


def _data_file(path: Path, what: str, location: str) -> Path:
    """The data file beside a graph: a plain file, and nowhere else."""
    folder = path.parent.resolve()
    try:
        file = (folder / location).resolve()
        inside, there = file.is_relative_to(folder), file.is_file()
    except (OSError, ValueError):  # names that no file has
        inside, there = True, False
    if not inside:
        raise BundleError(f"{what} lies in {location!r:.120}, which is outside the bundle; do not use it")
    if not there:
        raise BundleError(f"{what} lies in {location!r:.120}, which is missing; copy the bundle again")
    return file


def _count(what: str, word: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise BundleError(f"{what} has the {word} {text!r:.80}; {_AGAIN}")
    return int(text)
