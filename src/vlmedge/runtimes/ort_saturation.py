"""Whether ONNX Runtime's products of u8 and s8 matrices are exact on this processor, found by trying.

x86 without VNNI adds two such products in 16 bits, where they overflow. The option session.x64quantprecision avoids it
with a slower kernel, but ONNX Runtime applies it to every x86: with VNNI and AMX, where nothing overflows, prefill
takes 4 times as long and loading needs twice the memory. So it is set only where a product comes out wrong.
"""

from __future__ import annotations

from functools import cache

import numpy as np

# A graph of one node, c = MatMulInteger(a, b), opset 21; tests/test_onnxruntime.py builds it anew and compares.
GRAPH = (
    b"\x08\n\x12\x00:b\n\x18\n\x01a\n\x01b\x12\x01c\x22\rMatMulInteger\x12\x01g"
    b"Z\x15\n\x01a\x12\x10\n\x0e\x08\x02\x12\n\n\x03\x12\x01m\n\x03\x12\x01k"
    b"Z\x15\n\x01b\x12\x10\n\x0e\x08\x03\x12\n\n\x03\x12\x01k\n\x03\x12\x01n"
    b"b\x15\n\x01c\x12\x10\n\x0e\x08\x06\x12\n\n\x03\x12\x01m\n\x03\x12\x01nB\x04\n\x00\x10\x15"
)


@cache
def saturates() -> bool:
    """Tell whether the largest products overflow: 255 x 127, added over 64 columns."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(GRAPH, options, ["CPUExecutionProvider"])
    a, b = np.full((2, 64), 255, np.uint8), np.full((64, 16), 127, np.int8)
    (c,) = session.run(None, {"a": a, "b": b})
    return not np.array_equal(c, a.astype(np.int32) @ b.astype(np.int32))
