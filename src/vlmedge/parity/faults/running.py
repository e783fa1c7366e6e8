"""Faults of a runtime: one thing that it does wrong with every call."""

from __future__ import annotations

from vlmedge.parity.faults import decoding, seeing
from vlmedge.parity.faults.fault import Fault, Running, Target
from vlmedge.parity.faults.sessions import Passing


def _prefix(target: Target) -> bool:
    return target.spec.decoder.bidirectional_prefix


def _region(target: Target) -> bool:
    return target.spec.region is not None


def _joins(target: Target) -> bool:
    return target.spec.projector.joins_global


def _by(session: type[Passing]) -> Running:
    return Running(session)


RUNNING = (
    Fault("causal-picture", "the picture's positions attend causally", _by(decoding.Causal), ("logits",), _prefix),
    Fault("prefix-short", "the prefix ends one position early", _by(decoding.PrefixShort), ("logits",), _prefix),
    Fault("prefix-in-pieces", "the prefix is cut into batches", _by(decoding.PrefixInPieces), ("logits",), _prefix),
    Fault("bos-dropped", "the first token is not fed", _by(decoding.NoBos), ("logits",)),
    Fault("bos-twice", "the first token is fed twice", _by(decoding.TwoBos), ("logits",)),
    Fault("bos-last", "the first token stands behind the picture", _by(decoding.BosLast), ("logits",)),
    Fault("kv-loses", "the KV cache loses a position at every token", _by(decoding.Forgetful), ("tokens", "boxes")),
    Fault("kv-twice", "every token of an answer is fed twice", _by(decoding.Repeating), ("tokens", "boxes")),
    Fault("kv-stale", "a rewind leaves a position of the question before", _by(decoding.Stale),
          ("logits", "tokens", "boxes"), _region),
    Fault("logits-early", "a prompt's logits are those of its last position but one", _by(decoding.LogitsEarly),
          ("logits",)),
    Fault("hidden-early", "heads read the hidden state of the call before", _by(decoding.HiddenEarly), ("boxes",),
          _region),
    Fault("hidden-normed", "heads read the hidden state after the final norm", _by(decoding.HiddenNormed), ("boxes",),
          _region),
    Fault("pixels-bgr", "pixels reach the tower as BGR", _by(seeing.Blue), ("features",)),
    Fault("pixels-sideways", "x and y of crops exchanged", _by(seeing.Sideways), ("features",)),
    Fault("crops-reversed", "features of several crops of one call in another order", _by(seeing.CropsReversed),
          ("features",)),
    Fault("embeddings-scaled", "embeddings times the square root of their width", _by(decoding.ScaledEmbeddings),
          ("projected", "logits")),
    Fault("local-by-columns", "local crops projected in column order", _by(seeing.LocalByColumns), ("projected",),
          _joins),
    Fault("no-global", "the global crop dropped before projecting", _by(seeing.NoGlobal), ("projected",), _joins),
    Fault("no-local", "the local crops dropped before projecting", _by(seeing.NoLocal), ("projected",), _joins),
    Fault("tiling-turned", "rows and columns of the tiling exchanged before projecting", _by(seeing.TilingTurned),
          ("projected", "refused"), _joins),
    Fault("bins-flipped-running", "coordinate bins read from the other end", _by(seeing.BinsFlipped), ("regions",),
          _region),
    Fault("height-first", "heights and widths exchanged where sizes are fed", _by(seeing.HeightFirst),
          ("tokens", "regions"),
          _region),
)  # fmt: skip
