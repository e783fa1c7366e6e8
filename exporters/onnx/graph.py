"""A thin builder over onnx_ir: values in, nodes out, constants once, stored weights by reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlmedge.exporters.onnx.flavour import Flavour
from vlmedge.exporters.onnx.kinds import Kind
from vlmedge.exporters.onnx.store import Section, Store

# Opset 23 has rotary embedding and attention with past keys as standard operators; older runtimes have opset 21.
OPSETS: dict[Flavour, dict[str, int]] = {"ort": {"": 21, "com.microsoft": 1}, "portable": {"": 23}}
IR_VERSION = 10
CONTRIB = "com.microsoft"
F32, I64, I8 = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.INT8
TO_THE_END = 2**62  # as the end of a Slice
Dim = int | str


@dataclass(slots=True)
class Names:
    """Numbers for the names of nodes and values, one row for a graph and its subgraphs."""

    next: int = 0

    def new(self, op: str) -> str:
        """A name that no other node has."""
        self.next += 1
        return f"{op}_{self.next}"


@dataclass(slots=True)
class Graph:
    """One graph in the making.

    `kinds` gives every canonical matrix its form; `memo` keeps what handlers computed once for several readers.
    """

    name: str
    flavour: Flavour
    store: Store
    kinds: Mapping[str, Kind]
    prefill: frozenset[str] = frozenset()
    inputs: list[ir.Value] = field(default_factory=list)
    outputs: list[ir.Value] = field(default_factory=list)
    nodes: list[ir.Node] = field(default_factory=list)
    initializers: dict[Any, ir.Value] = field(default_factory=dict)
    stored: list[tuple[ir.Value, Section]] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    memo: dict[Any, ir.Value] = field(default_factory=dict)
    names: Names = field(default_factory=Names)

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[Dim]) -> ir.Value:
        """Declare a required input."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.inputs.append(value)
        return value

    def default_input(self, name: str, number: int) -> ir.Value:
        """Declare an int64 scalar input that need not be fed: it is an initializer too."""
        value = self.input(name, I64, ())
        value.const_value = ir.tensor(np.array(number, np.int64), name=name)
        self.initializers[name] = value
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[Dim]) -> None:
        """Declare an output; the value takes its name."""
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self.outputs.append(value)

    def node(self, op: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """Add a node with one output."""
        return self.nodes_of(op, *inputs, count=1, domain=domain, **attributes)[0]

    def contrib(self, op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Add a node of ONNX Runtime's own operators, with one output."""
        return self.node(op, *inputs, domain=CONTRIB, **attributes)

    def nodes_of(
        self, op: str, *inputs: ir.Value | None, count: int, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """Add a node and return its `count` outputs."""
        attrs = ir.convenience.convert_attributes(attributes) if attributes else ()
        node = ir.Node(domain, op, inputs, attrs, num_outputs=count, name=self.names.new(op))
        for i, out in enumerate(node.outputs):
            out.name = f"{node.name}_out{i}"
        self.nodes.append(node)
        return node.outputs

    def const(self, values: npt.ArrayLike, dtype: npt.DTypeLike) -> ir.Value:
        """A small constant, kept in the graph itself; equal ones are one."""
        array = np.asarray(values, dtype)
        key = (array.dtype, array.shape, array.tobytes())
        if key not in self.initializers:
            name = f"const_{len(self.initializers)}"
            value = ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(array.dtype)))
            value.shape, value.const_value = ir.Shape(array.shape), ir.tensor(array, name=name)
            self.initializers[key] = value
        return self.initializers[key]

    def i64(self, *numbers: int) -> ir.Value:
        """A constant int64 vector."""
        return self.const(numbers, np.int64)

    def load(self, section: Section, shape: Sequence[int] | None = None) -> ir.Value:
        """Refer to stored bytes, in the section's shape or in another of as many bytes."""
        dims = tuple(section.shape if shape is None else shape)
        key = (section.name, dims)
        if key not in self.initializers:
            taken = any(value.name == section.name for value in self.initializers.values())
            value = ir.Value(
                name=f"{section.name}.table" if taken else section.name,
                type=ir.TensorType(section.dtype),
                shape=ir.Shape(dims),
            )
            self.initializers[key] = value
            self.stored.append((value, section))
        return self.initializers[key]

    def reshape(self, x: ir.Value, *shape: int) -> ir.Value:
        """Another shape; 0 keeps a dimension, -1 is what remains."""
        return self.node("Reshape", x, self.i64(*shape))

    def dim(self, x: ir.Value, axis: int) -> ir.Value:
        """One dimension as an int64 scalar."""
        key = ("dim", id(x), axis)
        if key not in self.memo:
            self.memo[key] = self.node("Squeeze", self.node("Shape", x, start=axis, end=axis + 1), self.i64(0))
        return self.memo[key]

    def branch(self) -> Graph:
        """A subgraph in the making, which may use this graph's values and constants."""
        inner = Graph(self.name, self.flavour, self.store, self.kinds, self.prefill)
        inner.initializers, inner.stored, inner.names = self.initializers, self.stored, self.names
        return inner

    def subgraph(self, name: str) -> ir.Graph:
        """What a branch has become, for an attribute of If."""
        return ir.Graph([], self.outputs, nodes=self.nodes, name=name)

    def model(self, producer: str, version: str) -> ir.Model:
        """The whole graph as a model; stored weights must have their places by now."""
        for value, section in self.stored:
            value.const_value = ir.ExternalTensor(
                section.file, section.offset, section.bytes, section.dtype, shape=value.shape or ir.Shape(()),
                name=value.name or "",
            )  # fmt: skip
        opsets = OPSETS[self.flavour]
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports=opsets,
            name=self.name,
        )
        model = ir.Model(graph, ir_version=IR_VERSION, producer_name=producer, producer_version=version)
        model.metadata_props.update(self.facts)
        return model
