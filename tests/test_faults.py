"""The gate inside export against faults that converters really have had: each is caught, and its stage is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vlmedge import pipeline
from vlmedge.errors import VerificationError
from vlmedge.runtimes.llamacpp_session import LlamaCppSession
from vlmedge.runtimes.onnxruntime_session import OnnxSession
from vlmedge.spec import ModelSpec
from vlmedge.tensors import ArrayTensor, Tensor

Tensors = Mapping[str, Tensor]
Fault = Callable[[Tensors], Tensors]


SESSIONS = {"gguf": LlamaCppSession, "onnx": OnnxSession}


@pytest.fixture(params=SESSIONS)
def format_(request) -> str:
    return request.param


def swapped(a: str, b: str) -> Fault:
    """Two linear layers, or two halves of a packed one, in each other's place."""

    def fault(tensors):
        pairs = [(f"{x}.{kind}", f"{y}.{kind}") for x, y in ((a, b), (b, a)) for kind in ("weight", "bias")]
        return {**tensors, **{to: tensors[of] for to, of in pairs}}

    return fault


def changed(change: Callable[[np.ndarray], np.ndarray], *names: str) -> Fault:
    def fault(tensors):
        return {**tensors, **{name: ArrayTensor(change(tensors[name].read())) for name in names}}

    return fault


def halves(array):
    return np.ascontiguousarray(np.roll(array, array.shape[1] // 2, axis=1))


WEIGHTS = {
    "q and k of a decoder layer": ("logits", swapped("decoder.layers.1.attn.q", "decoder.layers.1.attn.k")),
    "k and v of a decoder layer": ("logits", swapped("decoder.layers.0.attn.k", "decoder.layers.0.attn.v")),
    "q and k of a tower layer": ("features", swapped("vision.layers.3.attn.q", "vision.layers.3.attn.k")),
    "two tower layers": ("features", swapped("vision.layers.25.mlp.up", "vision.layers.26.mlp.up")),
    "the projector's halves": ("projected", changed(halves, "projector.up.weight")),
    "the last decoder layer left out": (
        "logits",
        changed(
            np.zeros_like,
            *(f"decoder.layers.2.{part}.{kind}" for part in ("attn.out", "mlp.down") for kind in ("weight", "bias")),
        ),
    ),
    "a bias of the decoder": ("logits", changed(np.zeros_like, "decoder.layers.1.mlp.up.bias")),
    "the head's bias": ("logits", changed(np.zeros_like, "decoder.head.bias")),
    "a bias of the tower": ("features", changed(np.zeros_like, "vision.layers.0.attn.v.bias")),
    "a bias of the projector": ("projected", changed(np.zeros_like, "projector.down.bias")),
    "positions of the tower upside down": ("features", changed(lambda a: a[::-1].copy(), "vision.position")),
    "a region head": ("regions", changed(lambda a: -a, "region.size_decoder.up.weight")),
    "the frequencies of coordinates": ("regions", changed(lambda a: 2 * a, "region.coord_features")),
}
FACTS: dict[str, tuple[str, Callable[[ModelSpec], ModelSpec]]] = {
    "norm eps of the decoder": ("logits", lambda s: replace(s, decoder=replace(s.decoder, norm_eps=0.1))),
    "norm eps of the tower": ("features", lambda s: replace(s, vision=replace(s.vision, norm_eps=0.1))),
    "rotary base": ("logits", lambda s: replace(s, decoder=replace(s.decoder, rope_theta=500_000.0))),
    "normalisation of pixels": ("features", lambda s: replace(s, image=replace(s.image, std=(0.3, 0.3, 0.3)))),
}
ELSEWHERE = ("onnx", "normalisation of pixels")  # its graphs take normalised pixels: the exporter knows nothing of it


def refused(golden: Path, out: Path, format_: str, profile: str, stage: str) -> None:
    with pytest.raises(VerificationError, match=f"at the stage '{stage}'"):
        pipeline.export(golden, format_, profile, out, threads=1)
    assert not out.exists()


def inject(monkeypatch, **changes) -> None:
    """Change what the exporter is given, and nothing of what the original is."""
    job = pipeline.ExportJob

    def faulty(**given):
        return job(**given | {name: change(given[name]) for name, change in changes.items()})

    monkeypatch.setattr(pipeline, "ExportJob", faulty)


@pytest.mark.parametrize(("stage", "fault"), WEIGHTS.values(), ids=WEIGHTS)
def test_wrong_weights(golden, tmp_path, monkeypatch, format_, stage, fault):
    inject(monkeypatch, tensors=fault)
    refused(golden, tmp_path / "x", format_, "f32", stage)


@pytest.mark.parametrize(("format_", "name"), [(f, n) for f in SESSIONS for n in FACTS if (f, n) != ELSEWHERE])
def test_wrong_facts_in_the_files(golden, tmp_path, monkeypatch, format_, name):
    stage, fault = FACTS[name]
    inject(monkeypatch, order=lambda order: replace(order, spec=fault(order.spec)))
    refused(golden, tmp_path / "x", format_, "f32", stage)


def test_a_causal_picture(golden, tmp_path, monkeypatch, format_):
    session = SESSIONS[format_]
    forward = session.forward

    def causal(self, inputs, *, bidirectional=False, hidden=False, every=False):
        return forward(self, inputs, hidden=hidden, every=every)

    monkeypatch.setattr(session, "forward", causal)
    refused(golden, tmp_path / "x", format_, "f32", "logits")


def test_no_bos(golden, tmp_path, monkeypatch, format_):
    session = SESSIONS[format_]
    forward = session.forward

    def headless(self, inputs, *, bidirectional=False, hidden=False, every=False):
        rows = inputs[1:] if bidirectional else inputs
        return forward(self, rows, bidirectional=bidirectional, hidden=hidden, every=every)

    monkeypatch.setattr(session, "forward", headless)
    refused(golden, tmp_path / "x", format_, "f32", "logits")


def test_other_tokens(golden, tmp_path, monkeypatch, format_):
    """Right logits after the prompt and wrong tokens after it: a KV cache that loses a position."""
    session = SESSIONS[format_]
    forward = session.forward

    def forgetful(self, inputs, *, bidirectional=False, hidden=False, every=False):
        if len(inputs) == 1:
            self.rewind(self.position - 1)
        return forward(self, inputs, bidirectional=bidirectional, hidden=hidden, every=every)

    monkeypatch.setattr(session, "forward", forgetful)
    refused(golden, tmp_path / "x", format_, "f32", "greedy tokens")


EIGHT_BITS = ("q and k of a tower layer", "the projector's halves", "a region head")  # whatever the profile
DECODER = ("q and k of a decoder layer", "the last decoder layer left out")
COARSE = {"gguf": ("q4", "q3"), "onnx": ("q4", "q4-fast", "turbo")}
FINE = {"gguf": ("q8",), "onnx": ("q8", "w8a8")}
QUANTIZED = [
    *((f, p, n) for f, profiles in COARSE.items() for p in profiles for n in EIGHT_BITS),
    *((f, p, n) for f, profiles in FINE.items() for p in profiles for n in (*EIGHT_BITS, *DECODER)),
]


@pytest.mark.parametrize(("format_", "profile", "name"), QUANTIZED)
def test_quantized_exports_are_judged_too(golden, tmp_path, monkeypatch, format_, profile, name):
    """A decoder of few bits on random weights parts from the original as far as a fault in one layer takes it."""
    stage, fault = WEIGHTS[name]
    inject(monkeypatch, tensors=fault)
    refused(golden, tmp_path / "x", format_, profile, stage)
