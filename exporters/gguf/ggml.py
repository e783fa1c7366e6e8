"""ggml's tensor types: their sizes, which one a scheme means, and what replaces one whose blocks do not fit.

Sizes: `ggml/src/ggml-common.h` of llama.cpp. Replacements: `tensor_type_fallback` in `src/llama-quant.cpp`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vlmedge.errors import UnsupportedError, nearest
from vlmedge.quant_profiles import Scheme
from vlmedge.spec import Shape


@dataclass(frozen=True, slots=True)
class GgmlType:
    """`number` in files; `bytes` hold `block` neighbours of a row. `smaller`: the type to use where rows do not divide.

    `file_type`: llama.cpp's number for a file that is mostly this type (`enum llama_ftype`).
    """

    name: str
    number: int
    block: int
    bytes: int
    file_type: int
    smaller: str = "F16"

    @property
    def quantized(self) -> bool:
        """Does ggml's quantizer write it?"""
        return self.block > 1

    def size(self, shape: Shape) -> int:
        """Bytes of a tensor; the last axis is a multiple of `block`."""
        return math.prod(shape) // self.block * self.bytes


TYPES = {
    t.name: t
    for t in (
        GgmlType("F32", 0, 1, 4, 0),
        GgmlType("F16", 1, 1, 2, 1),
        GgmlType("BF16", 30, 1, 2, 32),
        GgmlType("Q4_0", 2, 32, 18, 2),
        GgmlType("Q4_1", 3, 32, 20, 3),
        GgmlType("Q5_0", 6, 32, 22, 8),
        GgmlType("Q5_1", 7, 32, 24, 9),
        GgmlType("Q8_0", 8, 32, 34, 7),
        GgmlType("IQ4_NL", 20, 32, 18, 25),
        GgmlType("Q2_K", 10, 256, 84, 10, "Q4_0"),
        GgmlType("Q3_K", 11, 256, 110, 12, "Q4_0"),
        GgmlType("Q4_K", 12, 256, 144, 15, "Q5_0"),
        GgmlType("Q5_K", 13, 256, 176, 17, "Q5_1"),
        GgmlType("Q6_K", 14, 256, 210, 18, "Q8_0"),
        GgmlType("IQ4_XS", 23, 256, 136, 30, "IQ4_NL"),
    )
}
F32, F16 = TYPES["F32"], TYPES["F16"]
INTEGERS = {8: "Q8_0", 6: "Q6_K", 5: "Q5_K", 4: "Q4_K", 3: "Q3_K", 2: "Q2_K"}


def wanted(scheme: Scheme) -> GgmlType:
    """The type that a scheme means, before any shape is looked at.

    Raises UnsupportedError for a native name that ggml does not have (with the nearest), or a width without a type.
    """
    native = scheme.native.get("gguf")
    if native is not None:
        if native not in TYPES:
            raise UnsupportedError(f"gguf has no type '{native}'{nearest(native, TYPES)}")
        return TYPES[native]
    if scheme.kind == "float":
        return F32 if scheme.bits == 32 else F16
    if scheme.bits == 4 and scheme.symmetric and scheme.group_size == 32:
        return TYPES["Q4_0"]
    if scheme.bits not in INTEGERS:
        raise UnsupportedError(
            f"gguf has no type for {scheme.bits}-bit integers; it has {', '.join(map(str, INTEGERS))} bits"
        )
    return TYPES[INTEGERS[scheme.bits]]


def fitting(kind: GgmlType, columns: int) -> tuple[GgmlType, str]:
    """The nearest type to `kind` whose blocks divide rows of `columns`, and the note that says why it differs."""
    chosen = kind
    while columns % chosen.block:
        chosen = TYPES[chosen.smaller]
    if chosen is kind:
        return kind, ""
    return chosen, f"{kind.name} needs rows of a multiple of {kind.block}, these have {columns}"
