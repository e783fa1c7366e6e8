"""A session that computes nothing: it counts what it is given and answers from a script."""

from collections.abc import Sequence

import numpy as np

from vlmedge.session import Step

VOCAB, WIDTH, TOKENS = 32, 4, 6


class FakeSession:
    """Logits favour the scripted tokens in turn; every call is recorded in `calls`."""

    runtime = "fake"

    def __init__(self, script: Sequence[int] = (), context: int = 64) -> None:
        self.script, self.context, self.position = list(script), context, 0
        self.calls: list[tuple] = []

    def vision(self, pixels):
        self.calls.append(("vision", len(pixels)))
        return np.zeros((len(pixels), 9, 3), np.float32)

    def project(self, features, tiling):
        self.calls.append(("project", len(features), tiling))
        return np.ones((TOKENS, WIDTH), np.float32)

    def embed(self, ids):
        self.calls.append(("embed", tuple(int(i) for i in ids)))
        return np.zeros((len(ids), WIDTH), np.float32)

    def forward(self, inputs, *, bidirectional=False, hidden=False, every=False):
        what = tuple(int(i) for i in inputs) if inputs.ndim == 1 else inputs.shape
        self.calls.append(("forward", what, bidirectional))
        self.position += len(inputs)
        logits = np.zeros((len(inputs), VOCAB) if every else VOCAB, np.float32)
        if not bidirectional and self.script:
            logits[..., self.script.pop(0)] = 1.0
        return Step(logits, np.full(WIDTH, self.position, np.float32) if hidden else None)

    def head(self, name, inputs):
        self.calls.append(("head", name, tuple(np.round(inputs, 3).tolist())))
        if name == "coord_decoder":
            return np.eye(8, dtype=np.float32)[int(inputs[0]) % 8]
        if name == "size_decoder":
            return np.concatenate([np.eye(5, dtype=np.float32)[4], np.eye(5, dtype=np.float32)[0]])
        return np.full(WIDTH, 2.0, np.float32)

    def rewind(self, position):
        self.calls.append(("rewind", position))
        self.position = min(self.position, position)

    def info(self):
        return {}

    def close(self):
        self.calls.append(("close",))
