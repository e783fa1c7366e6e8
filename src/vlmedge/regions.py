"""Boxes and points: the loop in which coordinates and sizes leave the hidden state and come back as embeddings.

The loop of vikhyat/moondream `moondream.py::_generate_points`; always greedy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from vlmedge.answer import Box, Point
from vlmedge.generate import Conversation, Embedded
from vlmedge.session import F32, Step
from vlmedge.spec import RegionSpec


def coordinate_of(logits: F32) -> float:
    """The coordinate, in 0..1, that the coordinate decoder's float32 [bins] mean."""
    return int(np.argmax(logits)) / len(logits)


def size_of(logits: F32, spec: RegionSpec) -> tuple[float, float]:
    """The width and height that the size decoder's float32 [2 * bins] mean."""
    width, height = (_size(int(index), spec) for index in logits.reshape(2, -1).argmax(axis=1))
    return width, height


def _size(index: int, spec: RegionSpec) -> float:
    if spec.size_scale == "linear":
        return index / spec.size_bins
    exponent = np.float32(index) / np.float32(spec.size_bins - 1) * np.float32(10.0) - np.float32(10.0)
    return float(np.power(np.float32(2.0), exponent))


class RegionDecoder:
    """Reads coordinates and sizes from hidden states of one conversation."""

    def __init__(self, spec: RegionSpec, conversation: Conversation) -> None:
        self._spec, self._conversation = spec, conversation

    def coordinate(self, step: Step) -> float:
        """The coordinate in a step's hidden state, in 0..1."""
        assert step.hidden is not None
        return coordinate_of(self._conversation.session.head("coord_decoder", step.hidden))

    def size(self, step: Step) -> tuple[float, float]:
        """The width and height in a step's hidden state."""
        assert step.hidden is not None
        return size_of(self._conversation.session.head("size_decoder", step.hidden), self._spec)

    def encoded(self, *values: float) -> Embedded:
        """The embedding of one coordinate, or of a width and a height; a `prompt.Slot` holds one or the other."""
        head = "coord_encoder" if len(values) == 1 else "size_encoder"
        rows: F32 = self._conversation.session.head(head, np.array(values, np.float32))[None]
        return Embedded(f"{head}:{values}", rows)

    def feed(self, *values: float) -> Step:
        """Append one coordinate or size; return the step with its hidden state."""
        return self._conversation.ask([self.encoded(*values)], hidden=True)

    def objects(
        self, first: Step, *, stop: Sequence[int], sizes: bool, most: int
    ) -> Iterator[tuple[int, Box | Point | None]]:
        """Yield (boundary token, box or point) until a stop token (with None), `most` objects, or the context's end."""
        step, needed, found = first, 3 if sizes else 2, 0
        session = self._conversation.session
        while True:
            token = int(np.argmax(step.logits))
            if token in stop:
                yield token, None
                return
            if found == most or session.position + needed > session.context:
                return
            x = self.coordinate(step)
            step = self.feed(x)
            y = self.coordinate(step)
            step = self.feed(y)
            if sizes:
                width, height = self.size(step)
                step = self.feed(width, height)
                yield token, Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            else:
                yield token, Point(x, y)
            found += 1
