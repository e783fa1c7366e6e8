"""The KV cache as ONNX Runtime sees it: buffers that are written in place, or outputs that become inputs."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from vlmedge.errors import RuntimeFailedError
from vlmedge.runtimes.ort_engine import InferenceSession

IOBinding: TypeAlias = Any  # onnxruntime has no types
OrtValue: TypeAlias = Any
Place: TypeAlias = tuple[str, int]
PAST, PRESENT = "past_key_values.", "present."
TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
}
_PLACES = {"Cpu": "cpu", "Cuda": "cuda", "CudaPinned": "cpu", "DML": "dml"}


@dataclass(frozen=True, slots=True)
class Slot:
    """Keys or values of one layer: the input's and output's names, [1, heads, positions, head_dim], the type.

    `place`: the memory in which the graph reads them, as (ONNX Runtime's word for it, number).
    """

    past: str
    present: str
    heads: int
    head_dim: int
    dtype: type[np.generic]
    place: Place = ("cpu", 0)


def slots_of(session: InferenceSession) -> list[Slot]:
    """The inputs of a decoder's graph that hold keys and values; raises ValueError for one of another kind.

    Raises RuntimeFailedError where they lie in a memory that this program cannot give to ONNX Runtime.
    """
    nodes = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
    return [_slot(node, _place(memory)) for node, memory in nodes if node.name.startswith(PAST)]


def _slot(node: Any, place: Place) -> Slot:
    if node.type not in TYPES or len(node.shape) != 4:
        raise ValueError(f"its input {node.name} is {node.type} {node.shape}, which cannot be keys or values")
    present = PRESENT + node.name.removeprefix(PAST)
    return Slot(node.name, present, node.shape[1], node.shape[3], TYPES[node.type], place)


def _place(memory: Any) -> Place:
    """ONNX Runtime's name of an allocator (allocator.h) as what `OrtDevice.make` takes."""
    if memory.name not in _PLACES:
        raise RuntimeFailedError(
            f"ONNX Runtime keeps keys and values in '{memory.name}' memory, which this version of vlmedge cannot "
            "bind: use the unit cpu"
        )
    return _PLACES[memory.name], int(memory.device_id)


def zero_pages(shape: tuple[int, ...], dtype: type[np.generic]) -> npt.NDArray[np.generic]:
    """Zeros whose memory is taken page by page as they are written, so that positions never used cost nothing.

    numpy asks for pages of 2 MB, a part of each being any head's: 707 MB instead of 282 for 750 of 2048 positions of
    a 1.4B decoder, no faster to read.
    """
    size = prod(shape) * np.dtype(dtype).itemsize
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}  # not on Windows
    return np.frombuffer(mmap.mmap(-1, size, **private), dtype).reshape(shape)


class KvCache(Protocol):
    """What a decoder asks of its cache. How many positions are alive is the decoder's to know."""

    def bind(self, io: IOBinding, start: int) -> None:
        """Bind pasts and presents for a call that appends at position `start`; the presents come first."""

    def collect(self, io: IOBinding, start: int, count: int) -> None:
        """Take what a call that appended `count` positions gave."""


class SharedKv:
    """One buffer of `context` positions per slot, past and present at once: nothing is copied, a rewind is free.

    `quantized`: the graph gives the first positions of an empty cache as fresh outputs (it computes them unquantized),
    which are copied to the front once. The buffers lie where the graph reads them: a past in another memory would be
    copied when it is bound, once, and what the graph appends to the present would never be seen.
    """

    def __init__(self, slots: Sequence[Slot], context: int, quantized: bool) -> None:
        import onnxruntime

        self._slots, self._quantized = slots, quantized
        self._buffers = [zero_pages((1, s.heads, context, s.head_dim), s.dtype) for s in slots]
        value = onnxruntime.OrtValue.ortvalue_from_numpy  # the buffer itself on a CPU, elsewhere a copy of it
        self._values = [value(buffer, *slot.place) for buffer, slot in zip(self._buffers, slots, strict=True)]
        self._in_place: dict[IOBinding, bool] = {}

    def bind(self, io: IOBinding, start: int) -> None:
        """Bind the buffers, unless they are bound from the call before."""
        in_place = start > 0 or not self._quantized
        if self._in_place.get(io) == in_place:
            return
        for slot, value in zip(self._slots, self._values, strict=True):
            io.bind_ortvalue_input(slot.past, value)
            if in_place:
                io.bind_ortvalue_output(slot.present, value)
            else:
                io.bind_output(slot.present, "cpu")
        self._in_place[io] = in_place

    def collect(self, io: IOBinding, start: int, count: int) -> None:
        """Copy fresh outputs to the front of the buffers; a call in place leaves nothing to do."""
        if self._in_place[io]:
            return
        for slot, buffer, value, fresh in zip(self._slots, self._buffers, self._values, io.get_outputs(), strict=False):
            buffer[:, :, :count] = fresh.numpy()
            if slot.place[0] != "cpu":
                value.update_inplace(buffer)
        self.bind(io, start + count)  # lets go of the outputs


class GrowingKv:
    """The outputs of one call are the pasts of the next: for graphs of standard operators only."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = slots
        self._values: list[OrtValue] = []
        self._length = 0

    def bind(self, io: IOBinding, start: int) -> None:
        """Bind the first `start` positions as pasts; what was rewound is cut off here."""
        self._cut(start)
        for slot, value in zip(self._slots, self._values, strict=True):
            io.bind_ortvalue_input(slot.past, value)
            io.bind_output(slot.present, *slot.place)  # where the next call reads it

    def collect(self, io: IOBinding, start: int, count: int) -> None:
        """Keep the presents, and let go of the pasts."""
        self._values, self._length = io.get_outputs()[: len(self._slots)], start + count
        io.clear_binding_inputs()

    def _cut(self, length: int) -> None:
        import onnxruntime

        if self._values and self._length == length:
            return
        if length:
            kept = [np.ascontiguousarray(value.numpy()[:, :, :length]) for value in self._values]
        else:
            kept = [np.empty((1, s.heads, 0, s.head_dim), s.dtype) for s in self._slots]
        self._values, self._length = [onnxruntime.OrtValue.ortvalue_from_numpy(part) for part in kept], length
