"""Sessions that feed the decoder something else, keep something else in its cache or give something else of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vlmedge.exporters import EXPORTERS
from vlmedge.parity.faults.sessions import How, Inputs, Passing
from vlmedge.session import F32, I32, Step


class Causal(Passing):
    """Never bidirectional."""

    def step(self, inputs: Inputs, how: How) -> Step:
        """Append positions."""
        return super().step(inputs, replace(how, bidirectional=False))


class _Cut(Passing):
    """A bidirectional prefix in two calls."""

    def _first(self, length: int) -> int:
        raise NotImplementedError

    def step(self, inputs: Inputs, how: How) -> Step:
        """Append positions."""
        if not how.bidirectional:
            return super().step(inputs, how)
        first = self._first(len(inputs))
        super().step(inputs[:first], How(bidirectional=True))
        return super().step(inputs[first:], replace(how, bidirectional=len(inputs) - first > 1))


class PrefixShort(_Cut):
    """The prefix ends one position early."""

    def _first(self, length: int) -> int:
        return length - 1


class PrefixInPieces(_Cut):
    """The first half of the prefix does not see the second, as where a batch is smaller than it."""

    def _first(self, length: int) -> int:
        return length // 2


class _Start(Passing):
    """The first rows of a conversation are others."""

    def _begun(self, rows: Inputs) -> Inputs:
        raise NotImplementedError

    def step(self, inputs: Inputs, how: How) -> Step:
        """Append positions."""
        rows = self._begun(inputs) if self.position == 0 and len(inputs) > 1 else inputs
        return super().step(rows, how)


class NoBos(_Start):
    """The first position is dropped."""

    def _begun(self, rows: Inputs) -> Inputs:
        return rows[1:]


class TwoBos(_Start):
    """The first position is there twice, as where a runtime adds BOS by itself."""

    def _begun(self, rows: Inputs) -> Inputs:
        return np.concatenate([rows[:1], rows])


class BosLast(_Start):
    """The picture stands before the first token."""

    def _begun(self, rows: Inputs) -> Inputs:
        return np.concatenate([rows[1:], rows[:1]])


class Forgetful(Passing):
    """The KV cache loses its last position before every step of an answer."""

    def step(self, inputs: Inputs, how: How) -> Step:
        """Append positions."""
        if len(inputs) == 1 and self.position:
            self._session.rewind(self.position - 1)
        return super().step(inputs, how)


class Repeating(Passing):
    """Every token of an answer is fed twice."""

    def step(self, inputs: Inputs, how: How) -> Step:
        """Append positions."""
        if len(inputs) == 1 and self.position + 1 < self.context:
            super().step(inputs, How())
        return super().step(inputs, how)


class Stale(Passing):
    """After a rewind one position of the question before is still there."""

    def rewind(self, position: int) -> None:
        """Forget every position but one from `position` on."""
        super().rewind(min(position + 1, self.position) if position else 0)


class LogitsEarly(Passing):
    """The logits of a prompt are those of its last position but one."""

    def step(self, inputs: Inputs, how: How) -> Step:
        """Append positions."""
        if len(inputs) == 1 or how.every:
            return super().step(inputs, how)
        step = super().step(inputs, replace(how, every=True))
        return replace(step, logits=step.logits[-2].copy())


class HiddenEarly(Passing):
    """Heads read the hidden state of the call before."""

    _before: F32 | None = None

    def step(self, inputs: Inputs, how: How) -> Step:
        """Append positions."""
        step = super().step(inputs, how)
        before, self._before = self._before, step.hidden if step.hidden is not None else self._before
        return step if step.hidden is None or before is None else replace(step, hidden=before)


class HiddenNormed(Passing):
    """Heads read the hidden state after the final norm."""

    def step(self, inputs: Inputs, how: How) -> Step:
        """Append positions."""
        step = super().step(inputs, how)
        return step if step.hidden is None else replace(step, hidden=self._normed(step.hidden))

    def _normed(self, x: F32) -> F32:
        manifest = self._bundle.manifest
        decoder = manifest.model.decoder
        tensors = EXPORTERS[manifest.format].read(manifest.model, self._bundle.path).tensors
        centred = x - x.mean() if decoder.norm == "layer" else x
        out = centred / np.sqrt(np.mean(np.square(centred)) + decoder.norm_eps) * tensors["decoder.norm.weight"].read()
        bias = tensors.get("decoder.norm.bias")
        normed: F32 = (out if bias is None else out + bias.read()).astype(np.float32)
        return normed


class ScaledEmbeddings(Passing):
    """Embeddings times the square root of their width, as Gemma's are."""

    def embed(self, ids: I32) -> F32:
        """Embed token ids."""
        return super().embed(ids) * np.float32(self._bundle.manifest.model.decoder.width**0.5)

    def step(self, inputs: Inputs, how: How) -> Step:
        """Append positions."""
        rows = self.embed(inputs.astype(np.int32)) if np.issubdtype(inputs.dtype, np.integer) else inputs
        return super().step(rows, how)
