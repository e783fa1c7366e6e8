"""A language model in libllama: one sequence, tokens or embeddings in, logits and the last hidden state out."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlmedge.errors import BundleError, ContextError, RuntimeFailedError, UnsupportedError
from vlmedge.runtimes import Memory
from vlmedge.runtimes.llamacpp_native import Native
from vlmedge.runtimes.llamacpp_tap import LastHiddenTap
from vlmedge.runtimes.llamacpp_units import Device
from vlmedge.session import F32, I32, Step
from vlmedge.spec import DecoderSpec

KvType = Literal["f16", "f32"]
_GGML_TYPES = {"f16": 1, "f32": 0}
_READ, _MAP = 0, 1  # llama_load_mode
_FLASH_OFF, _FLASH_AUTO = 0, -1  # on CPUs it costs a third of the decode speed; elsewhere llama.cpp asks the device
_ALL = -1  # layers on the device
_SEQUENCE = 0


class Decoder:
    """One model and its context (KV cache).

    The context is made without the tap for hidden states, because with it the scheduler asks Python about every
    node of the graph. Measured at 24 layers: 0.13 ms per token where no hidden state is wanted, 0.5 ms where one
    is, beside 40 ms (2B, Q4) or 2 ms (a small model) for the token itself. So the first request for a hidden state
    makes the context anew with the tap and moves the KV cache over (0.2 s for a picture in a 2B model); from then
    on it stays.
    """

    def __init__(
        self,
        native: Native,
        path: Path,
        spec: DecoderSpec,
        *,
        threads: int,
        memory: Memory,
        kv_type: KvType,
        batch: int,
        device: Device | None = None,
    ) -> None:
        """Load `path`. `batch`: the most positions of one native call, and so of one bidirectional block.

        `device`: what holds every layer and the KV cache, and computes them; None for the CPU. (The table of token
        embeddings stays with the CPU, which looks rows up in it.)
        Raises BundleError where llama.cpp refuses the file, or where it is another model than `spec`,
        RuntimeFailedError where the device gets none of the weights.
        """
        self._native, self._llama, self._spec = native, native.llama, spec
        self._threads, self._kv_type, self._batch_size = threads, kv_type, batch
        self._device = device
        self._tap = LastHiddenTap(native, spec.layers)
        self._tapped = False
        self._context: Any = None
        native.log.weights.clear()
        self.model: Any = self._load(path, memory)
        self.weights_mib = dict(native.log.weights)
        try:
            self._check(path)
            self._check_device(path)
            self._open_context(tapped=False)
        except BaseException:
            self.close()
            raise
        self._batch = self._llama.llama_batch()
        self._ids = np.zeros(batch, np.int32)
        self._id_pointer = self._ids.ctypes.data_as(ctypes.POINTER(self._llama.llama_token))
        self._every = np.ones(batch, np.int8).ctypes.data_as(ctypes.POINTER(ctypes.c_int8))

    @property
    def position(self) -> int:
        """Positions in the KV cache."""
        return int(self._llama.llama_memory_seq_pos_max(self._memory, _SEQUENCE)) + 1

    def forward(self, inputs: F32 | I32, *, bidirectional: bool, hidden: bool, every: bool) -> Step:
        """Append positions; see `Session.forward`. A failure leaves the cache as it was."""
        start, n = self.position, len(inputs)
        self._check_inputs(inputs)
        if start + n > self._spec.context:
            raise ContextError(
                f"{start + n} positions do not fit the model's context of {self._spec.context}: "
                f"{start} are taken, {n} were to be added"
            )
        if bidirectional and n > self._batch_size:
            raise UnsupportedError(f"a bidirectional block of {n} positions: this session takes {self._batch_size}")
        if hidden and not self._tapped:
            self._open_context(tapped=True)
        try:
            return self._run(inputs, bidirectional, hidden, every)
        except BaseException:
            self.rewind(start)
            raise

    def rewind(self, position: int) -> None:
        """Forget every position from `position` on."""
        if not self._llama.llama_memory_seq_rm(self._memory, _SEQUENCE, position, -1):
            raise self._native.log.failure(f"the KV cache could not be cut at position {position}")

    def close(self) -> None:
        """Free context and model, in that order."""
        context, self._context = self._context, None
        if context:
            self._llama.llama_free(context)
        model, self.model = self.model, None
        if model:
            self._llama.llama_model_free(model)

    def _check_inputs(self, inputs: F32 | I32) -> None:
        """Refuse what would make native code abort or read past the end."""
        width = () if np.issubdtype(inputs.dtype, np.integer) else (self._spec.width,)
        if not len(inputs) or inputs.shape[1:] != width:
            raise ValueError(f"inputs are ids [n] or embeddings [n, {self._spec.width}], n > 0; not {inputs.shape}")

    def _load(self, path: Path, memory: Memory) -> Any:
        # The CPU's list is empty: with none, a build for GPUs would give them work as it sees fit.
        self._chosen = self._device.listed() if self._device else (ctypes.c_void_p * 1)(None)
        params = self._native.fill(
            self._llama.llama_model_default_params(),
            devices=ctypes.cast(self._chosen, ctypes.c_void_p),
            n_gpu_layers=_ALL if self._device else 0,
            load_mode=_MAP if memory == "lean" else _READ,
            use_extra_bufts=memory == "fast",  # repacked for this processor: needs a copy, so nothing is mapped
        )
        model = self._llama.llama_model_load_from_file(os.fsencode(path), params)
        if not model:
            raise BundleError(str(self._native.log.failure(f"{path} does not load")))
        return model

    def _check(self, path: Path) -> None:
        llama, spec = self._llama, self._spec
        vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        found = (llama.llama_model_n_layer(self.model), llama.llama_model_n_embd(self.model), vocab)
        if found != (spec.layers, spec.width, spec.vocab):
            raise BundleError(
                f"{path} holds a model of (layers, width, vocabulary) {found}, not of "
                f"{(spec.layers, spec.width, spec.vocab)}; export it again"
            )

    def _check_device(self, path: Path) -> None:
        """Compare the device that was asked for with where llama.cpp says that it put the weights, where it says so."""
        if self._device is None or not self.weights_mib:
            return
        if not any(name.startswith(self._device.name) for name in self.weights_mib):
            raise RuntimeFailedError(
                f"{path} was to run on {self._device.name} ({self._device.unit}), but llama.cpp put the weights into "
                f"{', '.join(self.weights_mib)}: use the unit cpu"
            )

    def _open_context(self, *, tapped: bool) -> None:
        llama = self._llama
        params = self._native.fill(
            llama.llama_context_default_params(),
            n_ctx=self._spec.context,
            n_batch=self._batch_size,
            n_ubatch=self._batch_size,  # a bidirectional block must be computed in one piece
            n_seq_max=1,
            n_threads=self._threads,
            n_threads_batch=self._threads,
            flash_attn_type=_FLASH_OFF if self._device is None else _FLASH_AUTO,
            type_k=_GGML_TYPES[self._kv_type],
            type_v=_GGML_TYPES[self._kv_type],
            offload_kqv=self._device is not None,
            op_offload=self._device is not None,
            no_perf=True,
        )
        if tapped:
            self._native.fill(params, cb_eval=self._tap.callback)
        kept = self._take_state()
        self._context = llama.llama_init_from_model(self.model, params)
        if not self._context:
            raise self._native.log.failure(f"no context of {self._spec.context} positions could be made")
        self._tapped = tapped
        self._memory = llama.llama_get_memory(self._context)
        self._give_state(kept)

    def _take_state(self) -> Any:
        """Copy the KV cache out and free the old context, so that two caches never exist at once."""
        if self._context is None or not self.position:
            kept = None
        else:
            size = self._llama.llama_state_seq_get_size(self._context, _SEQUENCE)
            kept = (ctypes.c_uint8 * size)()
            self._llama.llama_state_seq_get_data(self._context, kept, size, _SEQUENCE)
        if self._context is not None:
            self._llama.llama_free(self._context)
            self._context = None
        return kept

    def _give_state(self, kept: Any) -> None:
        if kept is not None and not self._llama.llama_state_seq_set_data(self._context, kept, len(kept), _SEQUENCE):
            raise self._native.log.failure("the KV cache could not be moved")

    def _run(self, inputs: F32 | I32, bidirectional: bool, hidden: bool, every: bool) -> Step:
        if bidirectional:
            self._llama.llama_set_causal_attn(self._context, False)
        self._tap.wanted = hidden
        try:
            parts = []
            for start in range(0, len(inputs), self._batch_size):
                part = inputs[start : start + self._batch_size]
                self._decode(part, every)
                if every:
                    parts.append(self._logits(0, len(part)))
            logits = np.concatenate(parts) if every else self._logits(-1, 1)[0]
        finally:
            if bidirectional:
                self._llama.llama_set_causal_attn(self._context, True)
        return Step(logits, self._tap.take("last hidden state")[-1] if hidden else None)

    def _decode(self, part: F32 | I32, every: bool) -> None:
        batch, n = self._batch, len(part)
        batch.n_tokens = n  # positions and sequence are left out: llama.cpp counts on, in sequence 0
        if np.issubdtype(part.dtype, np.integer):
            self._ids[:n] = part
            batch.token, batch.embd = self._id_pointer, None
        else:
            part = np.ascontiguousarray(part, np.float32)
            batch.token, batch.embd = None, part.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        batch.logits = self._every if every else None
        if status := self._llama.llama_decode(self._context, batch):
            raise self._native.log.failure(f"llama.cpp could not decode {n} positions (status {status})")

    def _logits(self, index: int, count: int) -> F32:
        """Logits float32 [count, vocab] of the last native call from output `index` on, copied."""
        out = np.empty((count, self._spec.vocab), np.float32)
        source = self._llama.llama_get_logits_ith(self._context, index)
        ctypes.memmove(out.ctypes.data, source, out.nbytes)
        return out
