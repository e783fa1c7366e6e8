"""Codes of the shared quantizer as the bytes that ONNX operators read."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vlmedge.exporters.onnx.kinds import Kind
from vlmedge.quant_profiles.grids import Codes
from vlmedge.session import U8

_SIGN = np.uint8(0x80)  # toggles between codes around 128 and int8
_NIBBLE_SIGN = np.uint8(0x8)


def block_rows(codes: Codes, kind: Kind) -> dict[str, npt.NDArray[np.generic]]:
    """The form of MatMulNBits and GatherBlockQuantized: rows of blocks, two 4-bit codes a byte, the first one low."""
    k = codes.codes.shape[1]
    width = kind.groups(k) * kind.block
    padded = codes.codes if width == k else np.pad(codes.codes, ((0, 0), (0, width - k)))
    out: dict[str, npt.NDArray[np.generic]] = {
        "codes": padded if kind.bits == 8 else nibbles(padded),
        "scales": codes.scales,
    }
    if codes.zeros is not None:
        odd = codes.zeros.shape[1] % 2 if kind.bits == 4 else 0
        zeros = np.pad(codes.zeros, ((0, 0), (0, odd))) if odd else codes.zeros
        out["zeros"] = zeros if kind.bits == 8 else nibbles(zeros)
    return out


def signed(codes: U8, kind: Kind) -> U8:
    """Codes as two's complement where the kind is symmetric: int8, or int4 in the low half of each byte."""
    if not kind.symmetric:
        return codes
    toggled: U8 = codes ^ (_SIGN if kind.bits == 8 else _NIBBLE_SIGN)
    return toggled


def nibbles(codes: U8) -> U8:
    """Two 4-bit codes a byte along the last axis, which has an even length; the first one in the low half."""
    packed: U8 = codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))
    return packed
