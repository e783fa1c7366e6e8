"""What bins of coordinates and sizes mean, a second time: what a runtime feeds back is checked against it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from vlmedge.parity.record import Head
from vlmedge.session import F32
from vlmedge.spec import RegionSpec

_NEAR = 1e-5


def misread(heads: Sequence[Head], spec: RegionSpec) -> str:
    """The first number that is not what the bin before it means, in a line; empty where all are right.

    `heads`: calls in order. A decoder's output chooses a bin, and its value is what the next encoder is given.
    """
    for decoder, encoder in pairwise(heads):
        if decoder.read is None or decoder.name.replace("decoder", "encoder") != encoder.name:
            continue
        wanted = _values(decoder, spec)
        if not np.allclose(encoder.inputs, wanted, rtol=_NEAR, atol=0):
            what, found = decoder.name.partition("_")[0], encoder.inputs.tolist()
            return f"the {what} read from its bins is {found} instead of {wanted.tolist()}"
    return ""


def _values(decoder: Head, spec: RegionSpec) -> F32:
    """As in vikhyat/moondream `region.py`: bin / bins, and sizes on the other scale 2 ** (10 bin / (bins - 1) - 10)."""
    if decoder.name == "coord_decoder":
        return np.array([decoder.outputs.argmax() / decoder.outputs.size], np.float32)
    bins = decoder.outputs.reshape(2, -1).argmax(axis=1).astype(np.float64)
    linear = spec.size_scale == "linear"
    sizes = bins / spec.size_bins if linear else np.exp2(10 * bins / (spec.size_bins - 1) - 10)
    return np.array(sizes, np.float32)
