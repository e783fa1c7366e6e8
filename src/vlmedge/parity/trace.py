"""What one model makes of the test inputs, stage by stage: run once, then compared or written down.

Every path is walked at a price that a phone can pay: a small picture goes all the way; of a large one a single
local crop or two go through the tower, and features made from a formula are stitched, projected and answered to.
Pictures of the user's own go all the way through the model's skills.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vlmedge import imaging, picture
from vlmedge.answer import Box, Point
from vlmedge.generate import Conversation, Embedded, Prefix, Sampler, generate
from vlmedge.parity import pictures
from vlmedge.parity.record import Record, Recorder, Sight
from vlmedge.picture import PictureLike
from vlmedge.prompt import PictureSpan, TokenRun, render
from vlmedge.regions import RegionDecoder
from vlmedge.session import F32, U8
from vlmedge.skills import Model
from vlmedge.spec import Ids, Image, ModelSpec, PromptSpec, Template

TOKENS = 16
OBJECTS = 2  # boxes and points that are read whether or not the model sees any
THING = "object"
_PROMPT = 64  # positions that a caption's prompt fits
_OWN_TOKENS = 32  # of an answer about a picture of the user's


def needed_context(spec: ModelSpec) -> int:
    """Positions that a trace takes, at most the model's own."""
    prompt = max([_PROMPT, *(_ids(template) for template in spec.prompt.templates.values())])
    return min(spec.decoder.context, spec.image_tokens + 1 + prompt + max(TOKENS, _OWN_TOKENS))


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
    `regions`: what the region heads make of `pictures.region_inputs`, by name; `found`: boxes and points read from the
    small picture, `OBJECTS` each, by skill; both empty where the model has no region heads. `record`: every call.
    """

    features: F32
    local: F32
    small: Reading
    stitched: Reading
    regions: dict[str, F32]
    found: dict[str, tuple[Box | Point, ...]]
    record: Record

    def broken(self) -> str | None:
        """The first stage that holds numbers which are not finite, else None."""
        record = self.record
        stages = {
            "features": [call.features for call in record.vision],
            "projected": [call.rows for call in record.projections],
            "logits": [call.logits for call in record.forwards],
            "regions": [call.outputs for call in record.heads],
        }
        return next((name for name, arrays in stages.items() if not all(np.isfinite(a).all() for a in arrays)), None)


def trace(model: Model, own: Mapping[str, PictureLike] | None = None) -> Trace:
    """Run every stage of a model, which holds nothing after it; `own`: more pictures, by name.

    Raises ImageError for a picture that cannot be read.
    """
    spec, recorder = model.spec, Recorder(model.session)
    recorder.rewind(0)
    small, large = (pictures.pattern(*size) for size in pictures.sizes(spec.image))
    crops, local = imaging.crop(small, spec.image), imaging.crop(large, spec.image)
    features = recorder.vision(crops.pixels[:1])
    recorder.record.sights += [
        Sight("small picture", small, crops.tiling, crops.pixels, 0),
        Sight("large picture", large, local.tiling, local.pixels, None),
    ]
    made = pictures.features(local.count, spec.vision.tokens, spec.vision.width)
    heads = pictures.region_inputs(spec.decoder.width) if spec.region else {}
    # Two in one call, where there are two: a runtime may mix them up.
    local_features = recorder.vision(local.pixels[1:3])[:1]
    recorder.reading = "small picture"
    projected = recorder.project(np.repeat(features, crops.count, axis=0), crops.tiling)
    first, talk = _read(spec, recorder, projected)
    found = _regions(model, talk) if spec.region else {}
    recorder.reading = "large picture"
    second, _ = _read(spec, recorder, recorder.project(made, local.tiling))
    regions = {name: recorder.head(name, x) for name, x in heads.items()}
    _look(model, recorder, own or {})
    recorder.rewind(0)
    return Trace(features, local_features, first, second, regions, found, recorder.record)


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


def _ids(template: Template) -> int:
    """Literal ids of a template."""
    return sum(len(part.ids) for part in template if isinstance(part, Ids))


def _read(spec: ModelSpec, recorder: Recorder, projected: F32) -> tuple[Reading, Conversation]:
    talk = Conversation(recorder, spec.decoder.bidirectional_prefix)
    start, ids = caption_ids(spec.prompt)
    before = talk.begin(Prefix(((start,), Embedded("trace", projected))))
    assert before is not None, "a new conversation holds nothing"
    ids = ids[: max(0, recorder.context - recorder.position - 1)]  # of the smallest contexts there are
    step, rules = talk.ask([ids]) if ids else before, spec.prompt
    logits = step.logits.copy()
    out = generate(talk, step, stop=rules.stop, banned=rules.banned, max_tokens=TOKENS, sampler=Sampler())
    if ids:  # once more from the picture on: what the answer left in the cache must not show
        recorder.rewind(1 + len(projected))
        talk.ask([ids])
    return Reading(projected, logits, out.ids), talk


def _regions(model: Model, talk: Conversation) -> dict[str, tuple[Box | Point, ...]]:
    """Boxes and points behind the picture that the conversation holds.

    A stop token ends nothing here: a model that sees no object would leave the loop untried.
    """
    spec = model.spec
    assert spec.region is not None
    out: dict[str, tuple[Box | Point, ...]] = {}
    region = RegionDecoder(spec.region, talk)
    for skill in ("detect", "point"):
        if skill in spec.prompt.templates:
            segments = render(spec.prompt, skill, model.tokenizer, pictures=1, thing=THING)
            cut = 1 + max(i for i, s in enumerate(segments) if isinstance(s, PictureSpan))
            talk.session.rewind(spec.image_tokens + 1)
            ids = [s.ids for s in segments[cut:] if isinstance(s, TokenRun)]
            if talk.session.position + sum(map(len, ids)) >= talk.session.context:
                continue
            step = talk.ask(ids, hidden=True)
            objects = region.objects(step, stop=(), sizes=skill == "detect", most=OBJECTS)
            out[skill] = tuple(thing for _, thing in objects if thing is not None)
    return out


def _look(model: Model, recorder: Recorder, own: Mapping[str, PictureLike]) -> None:
    """Ask about every picture through the skills: a caption or a question, then boxes."""
    asked, record = Model(model.spec, recorder, model.tokenizer), recorder.record
    captions = [name for name in model.spec.prompt.templates if name.startswith("caption/")]
    for name, source in own.items():
        recorder.reading, seen, pixels = name, len(record.vision), picture.load_picture(source)
        if captions:
            length = "normal" if "caption/normal" in captions else captions[0].partition("/")[2]
            asked.caption(pixels, length, max_tokens=_OWN_TOKENS)
        else:
            asked.query(pixels, "What is in this picture?", max_tokens=_OWN_TOKENS)
        if len(record.vision) > seen:  # else the same picture was there before, under another name
            crops = np.concatenate([call.pixels for call in record.vision[seen:]])
            record.sights.append(_sight(name, pixels, crops, recorder))
        if "detect" in asked.skills:
            asked.detect(pixels, THING, max_objects=OBJECTS)


def _sight(name: str, pixels: U8, crops: U8, recorder: Recorder) -> Sight:
    last = len(recorder.record.projections) - 1
    tiling = recorder.record.projections[last].tiling
    if tiling == (1, 1) and len(crops) == 1:  # a single local crop equals the global one and is encoded once
        crops = np.repeat(crops, 2, axis=0)
    return Sight(name, pixels, tiling, crops, last)
