"""Faults in the weights that an exporter is given: another tensor's, permuted, transposed, cut or left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from vlmedge.exporters import ExportJob
from vlmedge.parity.faults.fault import Fault, Given, Target, everywhere
from vlmedge.session import F32
from vlmedge.spec import DecoderSpec, ModelSpec
from vlmedge.tensors import ArrayTensor, Tensor

Tensors = Mapping[str, Tensor]
Change = Callable[[Tensors, ModelSpec], Tensors]
# Weights are compared value by value before anything that is made of them.
_STAGES = ("weights",)
_NEIGHBOUR = 0.02  # how far a later release of a fine-tuned model has moved, relative RMS


def _fault(name: str, what: str, change: Change, applies: Callable[[Target], bool] = everywhere) -> Fault:
    def changed(job: ExportJob) -> ExportJob:
        return replace(job, tensors=change(job.tensors, job.order.spec))

    return Fault(name, what, Given(changed), _STAGES, applies)


def _layer(spec: ModelSpec, part: str) -> str:
    """The middle layer of a component."""
    layers = spec.vision.layers if part == "vision" else spec.decoder.layers
    return f"{part}.layers.{layers // 2}"


def _exchanged(tensors: Tensors, one: str, other: str) -> Tensors:
    """Everything under two names in each other's place."""
    names = {name: name.replace(one, other, 1) for name in tensors if name.startswith(one + ".")}
    return {**tensors, **{a: tensors[b] for a, b in names.items()}, **{b: tensors[a] for a, b in names.items()}}


def _changed(tensors: Tensors, change: Callable[[F32], F32], *names: str) -> Tensors:
    """`change` applied to those of the named tensors that there are."""
    here = [name for name in names if name in tensors]
    return {**tensors, **{name: ArrayTensor(change(tensors[name].read())) for name in here}}


def _linear(stem: str) -> tuple[str, str]:
    return f"{stem}.weight", f"{stem}.bias"


def _parts(one: str, other: str, part: str) -> Change:
    """Two matrices of one attention or MLP block exchanged."""
    return lambda t, s: _exchanged(t, f"{_layer(s, part)}.{one}", f"{_layer(s, part)}.{other}")


def _queries_and_keys(spec: DecoderSpec) -> Iterator[str]:
    for i in range(spec.layers):
        yield from (name for part in "qk" for name in _linear(f"decoder.layers.{i}.attn.{part}"))


def _permuted(to_interleaved: bool) -> Change:
    """Rows of queries and keys in the order of another style of rotary positions.

    Half-split pairs (i, i + d/2) become neighbours (2i, 2i + 1), as `permute` of llama.cpp's convert_hf_to_gguf.py
    makes them, or the reverse.
    """

    def change(tensors: Tensors, spec: ModelSpec) -> Tensors:
        decoder = spec.decoder
        pairs = np.arange(decoder.rope_dims).reshape(2, -1).T.ravel()
        turned = pairs if to_interleaved else np.argsort(pairs)
        order = np.concatenate([turned, np.arange(decoder.rope_dims, decoder.head_dim)])

        def rows(array: F32) -> F32:
            heads = array.reshape(-1, decoder.head_dim, *array.shape[1:])
            return heads[:, order].reshape(array.shape)

        return _changed(tensors, rows, *_queries_and_keys(decoder))

    return change


def _packed_by_head(tensors: Tensors, spec: ModelSpec) -> Tensors:
    """The packed matrix [q, k, v] read as [q, k, v of head 0, q, k, v of head 1, ...], as GPT-NeoX packs it."""
    at, heads = f"{_layer(spec, 'decoder')}.attn", spec.decoder.heads
    out = dict(tensors)
    for leaf in ("weight", "bias"):
        names = [f"{at}.{part}.{leaf}" for part in "qkv"]
        if names[0] in tensors:
            packed = np.concatenate([tensors[name].read() for name in names])
            by_head = packed.reshape(heads, 3, -1, *packed.shape[1:])
            out |= {n: ArrayTensor(by_head[:, i].reshape(tensors[n].shape)) for i, n in enumerate(names)}
    return out


def _patch(change: Callable[[F32], F32]) -> Change:
    return lambda t, s: _changed(t, change, "vision.patch.weight")


def _positions_by_columns(tensors: Tensors, spec: ModelSpec) -> Tensors:
    grid = spec.vision.grid
    return _changed(tensors, lambda a: a.reshape(grid, grid, -1).transpose(1, 0, 2).reshape(a.shape), "vision.position")


def _zeroed(*names: str) -> Change:
    """Left out: zeros in its place. `{vision}` and `{decoder}` stand for a middle layer."""

    def change(tensors: Tensors, spec: ModelSpec) -> Tensors:
        layers = {part: _layer(spec, part) for part in ("vision", "decoder")}
        return _changed(tensors, np.zeros_like, *(name.format(**layers) for name in names))

    return change


def _neutral_post_norm(tensors: Tensors, spec: ModelSpec) -> Tensors:
    ones = _changed(tensors, np.ones_like, "vision.post_norm.weight")
    return _changed(ones, np.zeros_like, "vision.post_norm.bias")


def _norms_plus_one(tensors: Tensors, spec: ModelSpec) -> Tensors:
    """As for a family that keeps its norms' weights less one."""
    norms = [n for n in tensors if n.startswith("decoder.") and "norm" in n and n.endswith(".weight")]
    return _changed(tensors, lambda a: a + 1, *norms)


def _scaled_queries(tensors: Tensors, spec: ModelSpec) -> Tensors:
    factor = np.float32(spec.decoder.head_dim**-0.5)
    return _changed(tensors, lambda a: a * factor, *_linear(f"{_layer(spec, 'decoder')}.attn.q"))


def _of_a_neighbour(tensors: Tensors, spec: ModelSpec) -> Tensors:
    random = np.random.default_rng(0)

    def moved(array: F32) -> F32:
        noise = random.standard_normal(array.shape, np.float32)
        return array + noise * np.float32(_NEIGHBOUR * np.sqrt(np.mean(np.square(array))))

    return _changed(tensors, moved, *(f"{_layer(spec, 'decoder')}.mlp.{part}.weight" for part in ("up", "down")))


def _rows(name: str, change: Callable[[F32, ModelSpec], F32]) -> Change:
    """A linear layer's outputs in another order."""
    return lambda t, s: _changed(t, lambda a: change(a, s), *_linear(name))


def _rolled_columns(name: str) -> Change:
    """A matrix's left and right half exchanged."""
    return lambda t, s: _changed(t, lambda a: np.roll(a, a.shape[1] // 2, axis=1), name)


def _equal_heads(target: Target) -> bool:
    return target.spec.decoder.heads == target.spec.decoder.kv_heads


def _rotary(target: Target) -> bool:
    return target.spec.decoder.rope_dims > 2


def _untied(target: Target) -> bool:
    return not target.spec.decoder.tied_head


def _joins(target: Target) -> bool:
    return target.spec.projector.joins_global


def _has_region(target: Target) -> bool:
    return target.spec.region is not None


def _has(name: str) -> Callable[[Target], bool]:
    """Has the model a tensor of this name, with `{decoder}` for a middle layer?"""
    return lambda target: name.format(decoder=_layer(target.spec, "decoder")) in target.types


def _layers_exchanged(tensors: Tensors, spec: ModelSpec) -> Tensors:
    return _exchanged(tensors, "decoder.layers.0", "decoder.layers.1")


def _last_tower_layers(tensors: Tensors, spec: ModelSpec) -> Tensors:
    last = spec.vision.layers - 1
    return _exchanged(tensors, f"vision.layers.{last - 1}.mlp.up", f"vision.layers.{last}.mlp.up")


def _tied(tensors: Tensors, spec: ModelSpec) -> Tensors:
    return {**tensors, "decoder.head.weight": tensors["decoder.embed.weight"]}


def _width_and_height(array: F32, spec: ModelSpec) -> F32:
    return np.roll(array, len(array) // 2, axis=0)


WEIGHTS = (
    _fault("decoder-q-k", "q and k of a decoder layer exchanged", _parts("attn.q", "attn.k", "decoder"), _equal_heads),
    _fault("decoder-k-v", "k and v of a decoder layer exchanged", _parts("attn.k", "attn.v", "decoder")),
    _fault("tower-q-k", "q and k of a tower layer exchanged", _parts("attn.q", "attn.k", "vision")),
    _fault("qkv-by-head", "packed q, k, v split head by head instead of in thirds", _packed_by_head, _equal_heads),
    _fault("rotary-interleaved", "rows of q and k permuted for interleaved rotary pairs", _permuted(True), _rotary),
    _fault("rotary-half-split", "rows of q and k permuted the other way", _permuted(False), _rotary),
    _fault("q-scaled-twice", "1 / sqrt(head_dim) folded into q, and applied again", _scaled_queries),
    _fault("gate-up", "gate and up of an MLP exchanged", _parts("mlp.gate", "mlp.up", "decoder"),
           _has("{decoder}.mlp.gate.weight")),
    _fault("patch-transposed", "x and y of the patch kernel exchanged", _patch(lambda a: a.transpose(0, 1, 3, 2))),
    _fault("patch-bgr", "the patch kernel's channels in the order BGR", _patch(lambda a: a[:, ::-1])),
    _fault("positions-by-columns", "the tower's positions column by column", _positions_by_columns),
    _fault("out-transposed", "a square matrix of the tower transposed",
           lambda t, s: _changed(t, lambda a: a.T, f"{_layer(s, 'vision')}.attn.out.weight")),
    _fault("tower-layers", "the MLPs of the last two tower layers exchanged", _last_tower_layers,
           lambda target: target.spec.vision.layers > 1),
    _fault("decoder-layers", "the first two decoder layers exchanged", _layers_exchanged,
           lambda target: target.spec.decoder.layers > 1),
    _fault("post-norm-neutral", "the tower's post-norm with weights of 1", _neutral_post_norm,
           lambda target: target.spec.vision.post_norm),
    _fault("norms-plus-one", "1 added to the decoder's norms", _norms_plus_one),
    _fault("tower-bias", "a bias of the tower left out", _zeroed("{vision}.attn.v.bias")),
    _fault("projector-bias", "a bias of the projector left out", _zeroed("projector.down.bias"),
           _has("projector.down.bias")),
    _fault("decoder-bias", "a bias of the decoder left out", _zeroed("{decoder}.mlp.up.bias"),
           _has("{decoder}.mlp.up.bias")),
    _fault("head-bias", "the head's bias left out", _zeroed("decoder.head.bias"), _has("decoder.head.bias")),
    _fault("head-tied", "the head's matrix is the embedding table", _tied, _untied),
    _fault("table-off-by-one", "the embedding table's rows shifted by one",
           lambda t, s: _changed(t, lambda a: np.roll(a, 1, axis=0), "decoder.embed.weight")),
    _fault("projector-halves", "the joined projector's halves exchanged", _rolled_columns("projector.up.weight"),
           _joins),
    _fault("neighbour-release", "an MLP of the release before: 2 % off", _of_a_neighbour),
    _fault("bins-flipped", "coordinate bins from the other end",
           _rows("region.coord_decoder.down", lambda a, s: a[::-1]), _has_region),
    _fault("width-height", "width and height of sizes exchanged",
           _rows("region.size_decoder.down", _width_and_height), _has_region),
    _fault("cos-sin", "cos and sin of coordinates exchanged", _rolled_columns("region.coord_encoder.weight"),
           _has_region),
    _fault("frequencies", "2 pi folded into the frequencies, and applied again",
           lambda t, s: _changed(t, lambda a: a * np.float32(2 * np.pi), "region.coord_features"), _has_region),
)  # fmt: skip
