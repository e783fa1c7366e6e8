"""What one model makes of the test inputs, stage by stage: run once, then compared or written down.

Every path is walked at a price that a phone can pay: a small picture goes all the way; of a large one a single
local crop goes through the tower, and features made from a formula are stitched, projected and answered to.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlmedge import imaging
from vlmedge.generate import Conversation, Embedded, Prefix, Sampler, generate
from vlmedge.parity import pictures
from vlmedge.session import F32
from vlmedge.skills import Model
from vlmedge.spec import Ids, ModelSpec, PromptSpec

TOKENS = 16
_PROMPT = 64  # positions that a caption's prompt surely fits


def needed_context(spec: ModelSpec) -> int:
    """Positions that a trace takes, at most the model's own."""
    return min(spec.decoder.context, spec.image_tokens + 1 + _PROMPT + TOKENS)


@dataclass(frozen=True, slots=True)
class Reading:
    """One prefill and the greedy tokens after it.

    `projected` float32 [image_tokens, width], `logits` float32 [vocab] of the last prompt position.
    """

    projected: F32
    logits: F32
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """All stages.

    `pixels`, `features`: the small picture's one crop; `local`: features of the large one's first local crop;
    `small` reads the small picture, `stitched` the features of `pictures.features` in the large one's tiling.
    """

    pixels: F32
    features: F32
    local: F32
    small: Reading
    stitched: Reading


def trace(model: Model) -> Trace:
    """Run every stage of an opened model."""
    spec, session = model.spec, model.session
    small, large = (imaging.crop(pictures.pattern(*size), spec.image) for size in pictures.sizes(spec.image))
    features = session.vision(small.pixels[:1])
    made = pictures.features(large.count, spec.vision.tokens, spec.vision.width)
    return Trace(
        imaging.normalise(small.pixels[:1], spec.image),
        features,
        session.vision(large.pixels[1:2]),
        _read(model, session.project(np.repeat(features, small.count, axis=0), small.tiling)),
        _read(model, session.project(made, large.tiling)),
    )


def caption_ids(prompt: PromptSpec) -> tuple[int, tuple[int, ...]]:
    """The first id and the ids behind the picture of the caption that tests ask for, the shortest there is."""
    names = [name for name in prompt.templates if name.startswith("caption/")]
    parts = prompt.templates["caption/short" if "caption/short" in names else names[0]]
    first, *rest = (part for part in parts if isinstance(part, Ids))
    return first.ids[0], tuple(i for part in rest for i in part.ids)


def _read(model: Model, projected: F32) -> Reading:
    talk = Conversation(model.session, model.spec.decoder.bidirectional_prefix)
    start, ids = caption_ids(model.spec.prompt)
    model.session.rewind(0)
    talk.begin(Prefix(((start,), Embedded("trace", projected))))
    step = talk.ask([ids])
    logits, rules = step.logits.copy(), model.spec.prompt
    out = generate(talk, step, stop=rules.stop, banned=rules.banned, max_tokens=TOKENS, sampler=Sampler())
    return Reading(projected, logits, out.ids)
