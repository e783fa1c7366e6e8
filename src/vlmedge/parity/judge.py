"""The reference's side of a comparison: what it makes of every call that was recorded.

It is read layer by layer (`reference.streamed`), all calls at once; the export's own tokens and coordinates are given
to it (teacher forcing), so one pass over the weights tells where it would have chosen otherwise, and by how much.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlmedge.parity.record import Forward, Head, Origin, Record
from vlmedge.session import F32, PREFILL_OVER, U8, Grid
from vlmedge.spec import ModelSpec
from vlmedge.tensors import Tensor

if TYPE_CHECKING:
    from vlmedge.reference.streamed import Passage, StreamedReference


@dataclass(frozen=True, slots=True)
class Judgement:
    """The reference's outputs, one for one beside the record's calls: features, rows, embedded ids, logits, heads."""

    features: tuple[F32, ...]
    projected: tuple[F32, ...]
    embedded: tuple[F32, ...]
    logits: tuple[F32, ...]
    heads: tuple[F32, ...]


def judge(
    record: Record,
    spec: ModelSpec,
    tensors: Mapping[str, Tensor],
    *,
    same_inputs: bool,
    halves: Collection[str] = frozenset(),
    threads: int | None = None,
) -> Judgement:
    """Let the reference redo every call. Needs PyTorch.

    `same_inputs`: each stage is given what the export's was given, so that it shows its own error alone; otherwise
    the stages follow each other from the pixels of the pictures on. What heads read from hidden states, they read from
    the reference's own. `halves`: as in `Readback`.
    """
    from vlmedge.reference.streamed import StreamedReference

    model = StreamedReference(spec, tensors, threads, halves)
    features, projected = _seen(model, record, spec, same_inputs)
    embedded = tuple(model.embed(call.ids) for call in record.embeddings)
    fixed = _encoders(model, record)
    rows = [_rows(model, f, None if same_inputs else (projected, fixed)) for f in record.forwards]
    logits, hidden = _decoded(model, record, rows)
    read = [(i, head) for i, head in enumerate(record.heads) if head.read is not None]
    answers = model.region([(head.name, hidden[_reads(head)]) for _, head in read]) if read else []
    heads = fixed | {i: answer for (i, _), answer in zip(read, answers, strict=True)}
    return Judgement(features, projected, embedded, logits, tuple(heads[i] for i in range(len(record.heads))))


def _seen(
    model: StreamedReference, record: Record, spec: ModelSpec, same_inputs: bool
) -> tuple[tuple[F32, ...], tuple[F32, ...]]:
    """Features of every vision call, and the rows of every projection."""
    from vlmedge.reference import preprocess

    sights = [] if same_inputs else record.sights
    own = {s.projection: preprocess.crops(s.picture, spec.image) for s in sights if s.projection is not None}
    pixels = [call.pixels for call in record.vision] + [crops for _, crops in own.values()]
    stacks, index = _distinct(pixels)
    features = model.vision(preprocess.normalise(stacks, spec.image))
    projections: list[tuple[F32, Grid]] = [(call.features, call.tiling) for call in record.projections]
    for (call, (tiling, _)), at in zip(own.items(), index[len(record.vision) :], strict=True):
        projections[call] = (features[at], tiling)
    return tuple(features[at] for at in index[: len(record.vision)]), tuple(model.project(projections))


def _distinct(stacks: Sequence[U8]) -> tuple[U8, list[list[int]]]:
    """All different crops, and for each stack of crops where they are among them."""
    places: dict[bytes, int] = {}
    crops: list[U8] = []
    index = []
    for stack in stacks:
        at = []
        for crop in stack:
            place = places.setdefault(crop.tobytes(), len(crops))
            if place == len(crops):
                crops.append(crop)
            at.append(place)
        index.append(at)
    return np.stack(crops), index


def _encoders(model: StreamedReference, record: Record) -> dict[int, F32]:
    """Heads that read no hidden state of this record: their inputs are numbers that both sides are given."""
    fixed = [i for i, head in enumerate(record.heads) if head.read is None]
    if not fixed:
        return {}
    return dict(zip(fixed, model.region([(record.heads[i].name, record.heads[i].inputs) for i in fixed]), strict=True))


def _reads(head: Head) -> int:
    assert head.read is not None
    return head.read


def _rows(model: StreamedReference, forward: Forward, own: tuple[Sequence[F32], Mapping[int, F32]] | None) -> F32:
    """What a call feeds: the export's rows, or (`own`: projections and heads) the reference's of the same origins."""
    if forward.ids is not None:
        return model.embed(forward.ids)
    assert forward.rows is not None
    if own is None:
        return forward.rows
    return np.concatenate([_row(model, o, row, *own) for o, row in zip(forward.origins, forward.rows, strict=True)])


def _row(
    model: StreamedReference, origin: Origin, given: F32, projected: Sequence[F32], heads: Mapping[int, F32]
) -> F32:
    if origin.kind == "projection":
        return projected[origin.call][origin.row : origin.row + 1]
    if origin.kind == "id":
        return model.embed(np.array([origin.call], np.int32))
    return heads[origin.call][None] if origin.kind == "head" else given[None]


def _decoded(model: StreamedReference, record: Record, rows: Sequence[F32]) -> tuple[tuple[F32, ...], dict[int, F32]]:
    """Logits and hidden state of the last position of every forward call."""
    trees: dict[int, list[int]] = {}
    for i in range(len(record.forwards)):
        trees.setdefault(record.root(i), []).append(i)
    decoded = model.decode([_tree(record, calls, rows) for calls in trees.values()])
    logits: dict[int, F32] = {}
    hidden: dict[int, F32] = {}
    for calls, found in zip(trees.values(), decoded, strict=True):
        logits |= dict(zip(calls, found.logits, strict=True))
        hidden |= dict(zip(calls, found.hidden, strict=True))
    return tuple(logits[i] for i in range(len(record.forwards))), hidden


def _tree(record: Record, calls: Sequence[int], rows: Sequence[F32]) -> Passage:
    """One conversation and its branches: a row sees the positions before its call, and of its call what it may."""
    from vlmedge.reference.streamed import Passage

    starts = dict(zip(calls, np.cumsum([0, *(len(rows[i]) for i in calls[:-1])]).tolist(), strict=True))
    total = sum(len(rows[i]) for i in calls)
    mask = np.zeros((total, total), np.bool_)
    positions, prefill, wanted = np.empty(total, np.int64), np.empty(total, np.bool_), []
    for i in calls:
        forward, own = record.forwards[i], slice(starts[i], starts[i] + len(rows[i]))
        for before, count in forward.path:
            mask[own, starts[before] : starts[before] + count] = True
        square = np.ones((len(rows[i]), len(rows[i])), np.bool_)
        mask[own, own] = square if forward.bidirectional else np.tril(square)
        first = sum(count for _, count in forward.path)
        positions[own] = np.arange(first, first + len(rows[i]))
        prefill[own] = len(rows[i]) > PREFILL_OVER
        wanted.append(own.stop - 1)
    return Passage(np.concatenate([rows[i] for i in calls]), positions, mask, tuple(wanted), prefill)
