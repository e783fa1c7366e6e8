"""A decoder in ONNX Runtime: embeddings in, logits and the last hidden state out, one KV cache that is never copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vlmedge.errors import BundleError, ContextError, UnsupportedError
from vlmedge.runtimes import Memory
from vlmedge.runtimes.huge_pages import Weights
from vlmedge.runtimes.ort_engine import InferenceSession
from vlmedge.runtimes.ort_errors import computing, loading
from vlmedge.runtimes.ort_kv import GrowingKv, KvCache, SharedKv, Slot, slots_of
from vlmedge.session import F32, PREFILL_OVER, Step
from vlmedge.spec import DecoderSpec

DECODER, PREFILL = "decoder_model_merged.onnx", "decoder_prefill.onnx"
_LONG_TALK = 100  # words of a session after which huge pages pay for themselves


class Opener(Protocol):
    """What opens the decoder's files: as they are, or through a cache of prepared ones."""

    def open(self, path: Path, *, spinning: bool = False) -> InferenceSession:
        """Open the graph of one file."""


class Decoder:
    """One or two graphs (decoding, and prefill where the bundle has it) over one KV cache."""

    def __init__(self, folder: Path, spec: DecoderSpec, opener: Opener, memory: Memory = "fast") -> None:
        """Open the decoder's files in `folder`. `memory` "lean" gives back what a long call needed when it is done.

        Raises BundleError for a file that is missing, damaged or of another model than `spec`.
        """
        self._spec = spec
        path, prefill = folder / DECODER, folder / PREFILL
        self._weights, self._talked = Weights(), 0
        with self._weights.watched():
            session = opener.open(path, spinning=True)
        slots = _checked_slots(session, path, spec)
        self._place = slots[0].place[0] if slots else "cpu"
        self.properties: dict[str, str] = dict(session.get_modelmeta().custom_metadata_map)
        self._kv = self._cache(slots)
        with loading(path):
            self._graph = DecoderGraph(session, self._kv, spec, memory)
        self._prefill = self._graph
        if prefill.is_file():
            session = opener.open(prefill)
            if _checked_slots(session, prefill, spec) != slots:
                raise BundleError(f"{prefill} does not share the KV cache of {path.name}; export it again")
            with loading(prefill):
                self._prefill = DecoderGraph(session, self._kv, spec, memory)
        self.position = 0

    @property
    def memory(self) -> str:
        """The memory that holds keys and values: "cpu", "cuda", ..."""
        return self._place

    @property
    def growing(self) -> bool:
        """Whether keys and values are outputs that become inputs, rather than one buffer."""
        return self.properties.get("vlmedge.kv") == "growing"

    def forward(self, x: F32, *, bidirectional: bool, hidden: bool, every: bool) -> Step:
        """Append embeddings float32 [n, width]; see `Session.forward`. A failure leaves the position as it was."""
        start, n = self.position, len(x)
        self.check(n)
        graph = self._prefill if n > PREFILL_OVER else self._graph
        if bidirectional and n > 1 and not graph.takes_prefix:
            raise UnsupportedError("a bidirectional block: this bundle's decoder is causal throughout")
        prefix = start + n if bidirectional else 0
        step = graph.run(x, start, prefix=prefix, hidden=hidden, every=every)
        self.position = start + n
        self._talked += n == 1
        if self._talked == _LONG_TALK:
            self._weights.collapse()
        return step

    def check(self, n: int) -> None:
        """Raise ContextError where `n` more positions do not fit, ValueError for none."""
        if not n:
            raise ValueError("inputs are ids [n] or embeddings [n, width] with n > 0, not empty")
        if self.position + n > self._spec.context:
            raise ContextError(
                f"{self.position + n} positions do not fit the model's context of {self._spec.context}: "
                f"{self.position} are taken, {n} were to be added"
            )

    def rewind(self, position: int) -> None:
        """Forget every position from `position` on."""
        self.position = max(0, min(self.position, position))

    def _cache(self, slots: list[Slot]) -> KvCache:
        if self.growing:
            return GrowingKv(slots)
        return SharedKv(slots, self._spec.context, quantized=self.properties.get("vlmedge.kv_type") == "int8")


class DecoderGraph:
    """One graph's session, and the memory that stays bound to it from call to call."""

    def __init__(self, session: InferenceSession, kv: KvCache, spec: DecoderSpec, memory: Memory) -> None:
        self._session, self._kv, self._spec = session, kv, spec
        self._io: Any = session.io_binding()
        self._long_call = _giving_back() if memory == "lean" else None
        optional = {node.name for node in session.get_overridable_initializers()}
        self._counters = {name: Counter() for name in ("prefix_len", "num_logits_to_keep") if name in optional}
        self._ones = np.ones((1, spec.context), np.int64)
        self._hidden = np.empty((1, 1, spec.width), np.float32)
        kv.bind(self._io, 0)  # first, so that the presents lead the outputs
        _bind_output(self._io, "hidden", self._hidden)

    @property
    def takes_prefix(self) -> bool:
        """Whether the graph can let positions see later ones."""
        return "prefix_len" in self._counters

    def run(self, x: F32, start: int, *, prefix: int, hidden: bool, every: bool) -> Step:
        """Append embeddings float32 [n, width] at position `start`; keys before `prefix` are visible to everyone."""
        io, n = self._io, len(x)
        logits = np.empty((1, n if every else 1, self._spec.vocab), np.float32)
        with computing(f"the decoder, {n} positions after {start}"):
            self._kv.bind(io, start)
            io.bind_cpu_input("inputs_embeds", np.ascontiguousarray(x, np.float32)[None])
            io.bind_cpu_input("attention_mask", self._ones[:, : start + n])
            self._count(prefix_len=prefix, num_logits_to_keep=0 if every else 1)
            _bind_output(io, "logits", logits)
            self._session.run_with_iobinding(io, self._long_call if n > PREFILL_OVER else None)
            self._kv.collect(io, start, n)
        return Step(logits[0] if every else logits[0, 0], self._hidden[0, 0].copy() if hidden else None)

    def _count(self, **values: int) -> None:
        for name, counter in self._counters.items():
            counter.array[()] = values[name]
            self._io.bind_ortvalue_input(name, counter.value)


class Counter:
    """An int64 scalar that the graph reads where it lies: inputs with a default take nothing but OrtValues."""

    def __init__(self) -> None:
        import onnxruntime

        self.array = np.zeros((), np.int64)
        self.value: Any = onnxruntime.OrtValue.ortvalue_from_numpy(self.array)


def _giving_back() -> Any:
    """Options of a run that frees the arena after it: 57 MB for 730 rows of 12 matrices, at a quarter more time."""
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def _bind_output(io: Any, name: str, array: F32) -> None:
    """Have an output written into an array, which the caller keeps alive."""
    io.bind_output(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)


def _checked_slots(session: InferenceSession, path: Path, spec: DecoderSpec) -> list[Slot]:
    with loading(path):
        slots = slots_of(session)
    shapes = {node.name: node.shape for node in (*session.get_inputs(), *session.get_outputs())}
    found = (len(slots) // 2, {(s.heads, s.head_dim) for s in slots}, *_last(shapes, "inputs_embeds", "logits"))
    expected = (spec.layers, {(spec.kv_heads, spec.head_dim)}, spec.width, spec.vocab)
    if found != expected:
        raise BundleError(
            f"{path} holds a model of (layers, (KV heads, head width), width, vocabulary) {found}, not of {expected}; "
            "export it again"
        )
    return slots


def _last(shapes: dict[str, list[int | str]], *names: str) -> tuple[int | str | None, ...]:
    return tuple(shapes[name][-1] if shapes.get(name) else None for name in names)
