"""Faults in the facts that an exporter is given: an epsilon, a rotary base, an activation, a number of layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vlmedge.exporters import ExportJob
from vlmedge.parity.faults.fault import Fault, Given, Target, everywhere
from vlmedge.parity.faults.manifest import edited, stale
from vlmedge.spec import ModelSpec

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Digits one by one, as StarCoder's tokenizer cuts them.
_DIGITS = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}
_STATED = ("facts",)
_LACKING = ("refused", "facts", "weights")  # a tensor that should be there is not: the reader says so


def _fault(
    name: str,
    what: str,
    change: Callable[[ModelSpec], ModelSpec],
    stages: tuple[str, ...] = _STATED,
    applies: Callable[[Target], bool] = everywhere,
) -> Fault:
    def changed(job: ExportJob) -> ExportJob:
        spec = change(job.order.spec)
        tensors = {name: job.tensors[name] for name in spec.tensors()}  # exporters want what they are told of
        return replace(job, order=replace(job.order, spec=spec), tensors=tensors)

    return Fault(name, what, Given(changed), stages, applies)


def _with(part: str, **facts: Any) -> Callable[[ModelSpec], ModelSpec]:
    """A block with other facts."""

    def change(spec: ModelSpec) -> ModelSpec:
        changes: dict[str, Any] = {part: replace(getattr(spec, part), **facts)}
        return replace(spec, **changes)

    return change


def _eps(part: str, wanted: float, instead: float) -> Callable[[ModelSpec], ModelSpec]:
    """Another epsilon; `instead` where it is `wanted` already."""
    return lambda s: _with(part, norm_eps=instead if getattr(s, part).norm_eps == wanted else wanted)(s)


def _less(part: str, field: str) -> Callable[[ModelSpec], ModelSpec]:
    return lambda s: _with(part, **{field: getattr(getattr(s, part), field) - 1})(s)


def _exact(part: str) -> Callable[[Target], bool]:
    return lambda target: getattr(target.spec, part).activation == "gelu_tanh"


def _has_vocabulary(target: Target) -> bool:
    """ONNX has none, apps read tokenizer.json."""
    return target.format == "gguf"


def _tokenizer(change: Callable[[bytes], bytes]) -> Given:
    return Given(lambda job: replace(job, tokenizer=change(job.tokenizer)))


FACTS = (
    _fault("decoder-eps-1e-6", "the decoder's norm epsilon 1e-6 for 1e-5, or the reverse", _eps("decoder", 1e-6, 1e-5)),
    _fault("decoder-eps-1e-12", "the decoder's norm epsilon BERT's 1e-12", _eps("decoder", 1e-12, 1e-5)),
    _fault("tower-eps-1e-6", "the tower's norm epsilon 1e-6 for 1e-5, or the reverse", _eps("vision", 1e-6, 1e-5)),
    _fault("tower-eps-1e-12", "the tower's norm epsilon BERT's 1e-12", _eps("vision", 1e-12, 1e-5)),
    _fault("rotary-base", "the rotary base of another family",
           lambda s: _with("decoder", rope_theta=500_000.0 if s.decoder.rope_theta < 5e5 else 10_000.0)(s)),
    _fault("rotary-all-dims", "every dimension of a head rotated",
           lambda s: _with("decoder", rope_dims=s.decoder.head_dim)(s),
           applies=lambda target: target.spec.decoder.rope_dims < target.spec.decoder.head_dim),
    _fault("rotary-half-dims", "half of the rotary dimensions",
           lambda s: _with("decoder", rope_dims=s.decoder.rope_dims // 2)(s),
           applies=lambda target: target.spec.decoder.rope_dims >= 4),
    _fault("tower-gelu-exact", "exact GELU for the tanh form in the tower", _with("vision", activation="gelu"),
           applies=_exact("vision")),
    _fault("decoder-gelu-exact", "exact GELU for the tanh form in the decoder", _with("decoder", activation="gelu"),
           applies=_exact("decoder")),
    _fault("projector-gelu-exact", "exact GELU for the tanh form in the projector",
           _with("projector", activation="gelu"), applies=_exact("projector")),
    _fault("tower-gelu-quick", "CLIP's quick GELU in the tower", _with("vision", activation="quick_gelu"),
           # Flavours that spell it out in Mul and Sigmoid state no name.
           ("facts", "features"), applies=_exact("vision")),
    _fault("tower-last-layer", "the tower's last layer dropped", _less("vision", "layers"), _LACKING),
    _fault("decoder-last-layer", "the decoder's last layer dropped", _less("decoder", "layers"), _LACKING),
    _fault("post-norm-dropped", "the tower without its post-norm", _with("vision", post_norm=False), _LACKING,
           lambda target: target.spec.vision.post_norm),
    _fault("head-tied-by-fact", "a head that is its own written as tied",
           _with("decoder", tied_head=True, head_bias=False), _LACKING,
           lambda target: not target.spec.decoder.tied_head),
    _fault("tower-heads", "twice as many heads in the tower",
           lambda s: _with("vision", heads=2 * s.vision.heads)(s),
           applies=lambda target: target.spec.vision.width % (2 * target.spec.vision.heads) == 0),
    _fault("mask-fact", "a decoder written for a causal picture", _with("decoder", bidirectional_prefix=False),
           ("refused", "facts"), lambda target: target.spec.decoder.bidirectional_prefix),
    _fault("pixels-clip", "CLIP's mean and deviation of pixels",
           lambda s: replace(s, image=replace(s.image, mean=_CLIP_MEAN, std=_CLIP_STD))),
    _fault("context-halved", "half of the context", lambda s: _with("decoder", context=s.decoder.context // 2)(s)),
    Fault("vocabulary-stale", "the vocabulary inside the files is of an older tokenizer", _tokenizer(stale),
          ("prompt",), _has_vocabulary),
    Fault("pre-tokenizer-in-files", "the files name another way of cutting words than the tokenizer's",
          _tokenizer(edited("pre_tokenizer", _DIGITS)), ("facts", "prompt"), _has_vocabulary),
    _fault("stop-in-files", "another stop token in the files that stock apps read",
           lambda s: replace(s, prompt=replace(s.prompt, stop=tuple(i + 1 for i in s.prompt.stop))),
           ("facts", "prompt")),
)  # fmt: skip
