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
from vlmedge.session import F32, Session
from vlmedge.spec import Ids, Image, ModelSpec, PromptSpec

TOKENS = 16
_PROMPT = 64  # positions that a caption's prompt fits


def needed_context(spec: ModelSpec) -> int:
    """Positions that a trace takes, at most the model's own."""
    prompt = max(_PROMPT, len(caption_ids(spec.prompt)[1]))
    return min(spec.decoder.context, spec.image_tokens + 1 + prompt + TOKENS)


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

    `features`: the small picture's one crop; `local`: features of the large one's first local crop;
    `small` reads the small picture, `stitched` the features of `pictures.features` in the large one's tiling;
    `regions`: what the region heads make of `pictures.region_inputs`, by name, empty where the model has none.
    """

    features: F32
    local: F32
    small: Reading
    stitched: Reading
    regions: dict[str, F32]

    def broken(self) -> str | None:
        """The first stage that holds numbers which are not finite, else None."""
        readings = (self.small, self.stitched)
        stages = {
            "features": [self.features, self.local],
            "projected": [r.projected for r in readings],
            "logits": [r.logits for r in readings],
            "regions": [*self.regions.values()],
        }
        return next((name for name, arrays in stages.items() if not all(np.isfinite(a).all() for a in arrays)), None)


def trace(spec: ModelSpec, session: Session) -> Trace:
    """Run every stage of a session, which holds nothing before and nothing after it.

    A `Model` over the session does not learn of this: give it a fresh one.
    """
    small, large = (imaging.crop(pictures.pattern(*size), spec.image) for size in pictures.sizes(spec.image))
    features = session.vision(small.pixels[:1])
    made = pictures.features(large.count, spec.vision.tokens, spec.vision.width)
    heads = pictures.region_inputs(spec.decoder.width) if spec.region else {}
    found = Trace(
        features,
        session.vision(large.pixels[1:2]),
        _read(spec, session, session.project(np.repeat(features, small.count, axis=0), small.tiling)),
        _read(spec, session, session.project(made, large.tiling)),
        {name: session.head(name, x) for name, x in heads.items()},
    )
    session.rewind(0)
    return found


def caption_ids(prompt: PromptSpec) -> tuple[int, tuple[int, ...]]:
    """The first id, and the ids behind the picture: those of the shortest caption there is.

    A model without captions is asked with the literal ids of another skill that begins with a picture, and one
    without any such skill with nothing: its first id is then the stop token, as exports have it.
    """
    names = sorted(prompt.templates, key=lambda name: (name != "caption/short", not name.startswith("caption/")))
    for name in names:
        head, tail = prompt.templates[name][:2], prompt.templates[name][2:]
        if len(head) == 2 and isinstance(head[0], Ids) and isinstance(head[1], Image):
            return head[0].ids[0], tuple(i for part in tail if isinstance(part, Ids) for i in part.ids)
    return prompt.stop[0], ()


def _read(spec: ModelSpec, session: Session, projected: F32) -> Reading:
    talk = Conversation(session, spec.decoder.bidirectional_prefix)
    start, ids = caption_ids(spec.prompt)
    before = talk.begin(Prefix(((start,), Embedded("trace", projected))))
    assert before is not None, "a new conversation holds nothing"
    step, rules = talk.ask([ids]) if ids else before, spec.prompt
    logits = step.logits.copy()
    out = generate(talk, step, stop=rules.stop, banned=rules.banned, max_tokens=TOKENS, sampler=Sampler())
    return Reading(projected, logits, out.ids)
