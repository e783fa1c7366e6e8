"""What usually makes a stage fail: the first thing to look at, learnt from converters' issue trackers and our own."""

from __future__ import annotations

from vlmedge.limits import Against
from vlmedge.parity.report import StageResult

_USUAL = {
    "files": "a broken download, or a file of another bundle; copy the bundle again",
    "facts": "the exporter took a number from a default instead of the config, or this is another checkpoint",
    "prompt": "the tokenizer of another release (merges, added tokens), or a template with another token",
    "preprocess": "the resizer's filter, the order of its passes or its antialiasing; the crops' margin, order or "
    "number; BGR for RGB",
    "weights": "a tensor under another's name (q, k and v), permuted for another style of rotary positions, transposed "
    "or cut; scales or offsets of another block; or this is not the checkpoint that the bundle was made from",
    "features": "pixels normalised otherwise, patches in another order, another GELU or norm epsilon, the last block "
    "or the post-norm left out",
    "projected": "the projector's halves swapped, local crops stitched or pooled in another order, a bias left out",
    "logits": "the mask of the picture's positions (causal for bidirectional), another style, base or width of rotary "
    "positions, BOS dropped, a norm epsilon",
    "tokens": "the KV cache: a position lost, counted twice or left from another question",
    "regions": "size bins on another scale, frequencies of the Fourier features, a head's layers in another order",
    "boxes": "the hidden state taken after the final norm, or of another position; bins counted from the other end",
}
_COST = (
    "quantization: the exporter is right, these weights lose more in this profile than its limit allows; "
    "'vlmedge verify --ablate' tells which component, a profile with more bits helps"
)


def usual_cause(stage: str, against: Against | None, passed: tuple[StageResult, ...]) -> str:
    """What usually causes a failure at this stage, given what passed before it."""
    right = any(s.stage == stage and s.against == "stored" and s.outcome == "passed" for s in passed)
    return _COST if against == "original" and right else _USUAL[stage]
