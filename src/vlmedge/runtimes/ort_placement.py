"""Which operators of a graph an execution provider took, and which ONNX Runtime left to the CPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmedge.errors import RuntimeFailedError

RECORD = ("session.record_ep_graph_assignment_info", "1")  # onnxruntime_session_options_config_keys.h
# Nearly all the work of a model, as exporters write it and as ONNX Runtime fuses it before it places it.
_PRODUCTS = frozenset(
    (
        "Conv",
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "FusedConv",
        "FusedGemm",
        "FusedMatMul",
        "Gemm",
        "MatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QLinearConv",
        "QLinearMatMul",
    )
)


@dataclass(frozen=True, slots=True)
class Placement:
    """The operators of one graph, counted by kind: those on the unit, and those on the CPU."""

    unit: Counter[str]
    cpu: Counter[str]

    def __str__(self) -> str:
        """For a reader: "17 of 340 operators: Shape 9, Gather 8"; the commonest first."""
        kinds = ", ".join(f"{kind} {count}" for kind, count in self.cpu.most_common())
        return f"{self.cpu.total()} of {self.cpu.total() + self.unit.total()} operators: {kinds}"

    def check(self, path: Path, unit: str) -> None:
        """Raise RuntimeFailedError where the CPU has most of the products of matrices, and so most of the work."""
        here, there = (sum(count[kind] for kind in _PRODUCTS) for count in (self.unit, self.cpu))
        if there > here:
            raise RuntimeFailedError(
                f"{path} was to run on '{unit}', which takes {here} of its {here + there} products of matrices and "
                "leaves the rest to the CPU: use the unit cpu, or export the flavour portable"
            )


def placement(session: Any, provider: str) -> Placement:
    """Count the operators of an opened graph whose session was made with `RECORD`.

    ONNX Runtime reports them as they were placed, after its basic optimizations.
    """
    found = Placement(Counter(), Counter())
    for part in session.get_provider_graph_assignment_info():
        count = found.unit if part.ep_name == provider else found.cpu
        count.update(node.op_type for node in part.get_nodes())
    return found
