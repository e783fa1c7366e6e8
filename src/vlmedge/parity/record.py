"""A session that remembers every call made to it, so that another model can be asked to make the same ones.

It stands between a real session and the real skills: what is verified is what answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from vlmedge.relay import Relay
from vlmedge.session import F32, I32, U8, Grid, Session, Step

# Which forward calls hold the positions before a call, and how many of each.
Path: TypeAlias = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Vision:
    """Crops uint8 [n, size, size, 3] and their features float32 [n, tokens, width]."""

    pixels: U8
    features: F32


@dataclass(frozen=True, slots=True)
class Projection:
    """One picture's features [crops, tokens, width], its tiling, and the embeddings [image_tokens, width]."""

    features: F32
    tiling: Grid
    rows: F32


@dataclass(frozen=True, slots=True)
class Embedding:
    """Token ids [n] and their rows [n, width]."""

    ids: I32
    rows: F32


@dataclass(frozen=True, slots=True)
class Head:
    """A region head's input and output; `read`: the forward call whose hidden state the input is, else None."""

    name: str
    inputs: F32
    outputs: F32
    read: int | None


@dataclass(frozen=True, slots=True)
class Origin:
    """Where one row of embeddings came from: `kind`'s call number `call`, row `row`; of an "id", `call` is the id."""

    kind: Literal["id", "projection", "head", "given"]
    call: int = 0
    row: int = 0


@dataclass(frozen=True, slots=True)
class Forward:
    """One call of the decoder: what it was given and what the last position gave.

    `reading`: the recorder's label. `ids` int32 [n] or `rows` float32 [n, width] with their `origins`; `path`: the
    positions before it. `decodes`: it is one step of an answer, rather than a prompt. `logits` float32 [vocab],
    `hidden` float32 [width] where it was asked for.
    """

    reading: str
    path: Path
    ids: I32 | None
    rows: F32 | None
    origins: tuple[Origin, ...]
    bidirectional: bool
    decodes: bool
    logits: F32
    hidden: F32 | None

    @property
    def length(self) -> int:
        """Positions that it adds."""
        return len(self.ids) if self.ids is not None else len(self.origins)

    @property
    def chooses(self) -> bool:
        """Is a word chosen from its logits? After what is fed back for a box, only whether there is another one."""
        return self.ids is not None


@dataclass(frozen=True, slots=True)
class Sight:
    """A picture uint8 [h, w, 3], and the crops and tiling that were made of it.

    `projection`: the call that projected all of them; None where only some crops were encoded.
    """

    name: str
    picture: U8
    tiling: Grid
    pixels: U8
    projection: int | None


@dataclass(slots=True)
class Record:
    """Every call, by kind, in order; and what the pictures among the inputs were."""

    sights: list[Sight] = field(default_factory=list)
    vision: list[Vision] = field(default_factory=list)
    projections: list[Projection] = field(default_factory=list)
    embeddings: list[Embedding] = field(default_factory=list)
    heads: list[Head] = field(default_factory=list)
    forwards: list[Forward] = field(default_factory=list)

    def root(self, forward: int) -> int:
        """The first call of the conversation that a call belongs to."""
        path = self.forwards[forward].path
        return path[0][0] if path else forward

    def readings(self) -> Iterator[tuple[str, list[int]]]:
        """Labels in order, each with its forward calls."""
        for label in dict.fromkeys(f.reading for f in self.forwards):
            yield label, [i for i, f in enumerate(self.forwards) if f.reading == label]


class Recorder(Relay):
    """A `Session` that passes every call on and keeps what went in and what came out.

    `reading` labels the calls that follow.
    """

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.record = Record()
        self.reading = ""
        self._live: list[tuple[int, int]] = []
        self._rows: dict[bytes, list[Origin]] = {}
        self._hidden: dict[bytes, int] = {}

    def vision(self, pixels: U8) -> F32:
        """Encode crops."""
        features = super().vision(pixels)
        self.record.vision.append(Vision(pixels.copy(), features.copy()))
        return features

    def project(self, features: F32, tiling: Grid) -> F32:
        """Project one picture's features."""
        rows = super().project(features, tiling)
        call = len(self.record.projections)
        self.record.projections.append(Projection(features.copy(), tiling, rows.copy()))
        self._know(rows, [Origin("projection", call, row) for row in range(len(rows))])
        return rows

    def embed(self, ids: I32) -> F32:
        """Embed token ids."""
        rows = super().embed(ids)
        self.record.embeddings.append(Embedding(np.array(ids, np.int32), rows.copy()))
        self._know(rows, [Origin("id", int(i)) for i in ids])
        return rows

    def forward(
        self, inputs: F32 | I32, *, bidirectional: bool = False, hidden: bool = False, every: bool = False
    ) -> Step:
        """Append positions."""
        path = tuple(self._live)
        step = super().forward(inputs, bidirectional=bidirectional, hidden=hidden, every=every)
        ids = inputs.astype(np.int32) if np.issubdtype(inputs.dtype, np.integer) else None
        rows = None if ids is not None else np.array(inputs, np.float32)
        origins = () if rows is None else tuple(self._origins(rows))
        call, before = len(self.record.forwards), self.record.forwards[path[-1][0]] if path else None
        # One position behind a picture is a prompt of one token.
        decodes = len(inputs) == 1 and before is not None and (before.ids is not None or before.length == 1)
        last = step.logits[-1] if every else step.logits
        state = None if step.hidden is None else step.hidden.copy()
        # A copy: whoever samples bans tokens in these very logits.
        found = Forward(self.reading, path, ids, rows, origins, bidirectional, decodes, last.copy(), state)
        self.record.forwards.append(found)
        if state is not None:
            self._hidden[_key(state)] = call
        self._live.append((call, found.length))
        return step

    def head(self, name: str, inputs: F32) -> F32:
        """Run a region head."""
        outputs = super().head(name, inputs)
        call, read = len(self.record.heads), self._hidden.get(_key(np.asarray(inputs, np.float32)))
        self.record.heads.append(Head(name, np.array(inputs, np.float32), outputs.copy(), read))
        self._know(outputs[None], [Origin("head", call)])
        return outputs

    def rewind(self, position: int) -> None:
        """Forget every position from `position` on."""
        super().rewind(position)
        kept, left = [], position
        for call, length in self._live:
            if left > 0:
                kept.append((call, min(length, left)))
            left -= length
        self._live = kept

    def _know(self, rows: F32, origins: list[Origin]) -> None:
        for row, origin in zip(rows, origins, strict=True):
            known = self._rows.setdefault(_key(row), [])
            if origin not in known:
                known.append(origin)

    def _origins(self, rows: F32) -> Iterator[Origin]:
        """Rows are recognised by their numbers; where several are equal, the one that continues the row before."""
        before = Origin("given")
        for row in rows:
            known = self._rows.get(_key(row)) or [Origin("given")]
            following = Origin(before.kind, before.call, before.row + 1)
            before = following if following in known else known[0]
            yield before


def _key(row: F32) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(row, np.float32).tobytes(), digest_size=16).digest()
