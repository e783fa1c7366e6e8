"""The forms in which ONNX graphs hold a matrix: floats, integers in blocks, integers per row with 8-bit activations."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vlmedge.errors import UnsupportedError, nearest
from vlmedge.quant_profiles import Scheme
from vlmedge.quant_profiles.grids import Grid


@dataclass(frozen=True, slots=True)
class Kind:
    """`bits` of a value; `block` neighbours of a row share a scale (0: the whole row, or floats).

    `activations`: 8 where the other factor is rounded to 8 bits row by row, so that the product is one of integers.
    """

    name: str
    bits: int
    block: int = 0
    symmetric: bool = True
    activations: int = 0

    @property
    def floating(self) -> bool:
        """Stored as floats?"""
        return self.bits >= 16

    @property
    def grid(self) -> Grid:
        """The quantizer's word for it."""
        return Grid(self.bits, self.block, self.symmetric)

    def groups(self, columns: int) -> int:
        """Scales of one row."""
        return -(-columns // self.block) if self.block else 1

    def zero_bytes(self, columns: int) -> int:
        """Bytes of one row's packed zero points."""
        return 0 if self.symmetric else math.ceil(self.groups(columns) * self.bits / 8)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("f32", 32),
        Kind("f16", 16),
        Kind("w8a8", 8, activations=8),
        *(Kind(f"int{bits}_{block}", bits, block) for bits in (4, 8) for block in (32, 64, 128)),
        *(Kind(f"uint4_{block}", 4, block, symmetric=False) for block in (32, 64, 128)),
    )
}
F32, F16, W8A8, INT8 = KINDS["f32"], KINDS["f16"], KINDS["w8a8"], KINDS["int8_32"]


def wanted(scheme: Scheme) -> Kind:
    """Return the kind that a scheme means; more bits than it asks for where there is no kind of just as many.

    Raises UnsupportedError for a native name that is none, and for less than 4 bits.
    """
    native = scheme.native.get("onnx")
    if native is not None:
        if native not in KINDS:
            raise UnsupportedError(
                f"ONNX has no kind '{native}'{nearest(native, KINDS)} (there are {', '.join(KINDS)})"
            )
        return KINDS[native]
    if scheme.kind == "float":
        return F32 if scheme.bits == 32 else F16
    if scheme.activations:
        return W8A8
    if scheme.bits < 4:
        raise UnsupportedError(f"ONNX export has no {scheme.bits}-bit integers; use 4 bits or more")
    block = next((b for b in (32, 64, 128) if b >= scheme.group_size), 128) if scheme.group_size else 128
    if scheme.bits > 4:
        return KINDS[f"int8_{block}"]
    return KINDS[f"{'int' if scheme.symmetric else 'uint'}4_{block}"]
