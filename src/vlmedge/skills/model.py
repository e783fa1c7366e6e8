"""The skills of an opened model: caption, query, chat, detect, point, gaze, over any session."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np

from vlmedge import imaging, picture, prompt
from vlmedge.answer import Answer
from vlmedge.errors import UnsupportedError, UsageError
from vlmedge.generate import Conversation, Embedded, Prefix, Sampler, check_seed
from vlmedge.measure import Clock
from vlmedge.picture import PictureLike
from vlmedge.prompt import PictureSpan, Reference, Segment, Slot, Tokenizer, TokenRun
from vlmedge.regions import RegionDecoder
from vlmedge.session import F32, Session
from vlmedge.skills import given
from vlmedge.skills.gaze import steady_gaze
from vlmedge.skills.request import OnToken, Options, Request
from vlmedge.spec import Ids, ModelSpec

_KEPT_PICTURES = 4


class Model:
    """An opened model. A picture is a path, a PIL image or uint8 [h, w, 3]; `None` means text only.

    Every skill also takes `max_tokens`, `temperature` (0 is greedy), `seed` and `on_token` (called with each new
    piece of text) by name. Not for use from several threads at once.
    """

    def __init__(self, spec: ModelSpec, session: Session, tokenizer: Tokenizer) -> None:
        self.spec = spec
        self.session = session
        self.tokenizer = tokenizer
        self._conversation = Conversation(session, spec.decoder.bidirectional_prefix, spec.decoder.context)
        self._encoded: OrderedDict[str, tuple[Embedded, int]] = OrderedDict()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the runtime's memory."""
        self.session.close()

    @property
    def skills(self) -> tuple[str, ...]:
        """The skills that this model has."""
        return prompt.skills(self.spec.prompt)

    def caption(
        self,
        image: PictureLike,
        length: str = "normal",
        *,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
        on_token: OnToken | None = None,
    ) -> Answer:
        """Describe a picture; `length` is "short", "normal" or "long" where the release has it."""
        options = self._options(max_tokens, temperature, seed, on_token)
        return self._begin("caption", f"caption/{length}", [image]).answer(options)

    def query(
        self,
        image: PictureLike | None,
        question: str,
        *,
        reasoning: bool = False,
        spatial_refs: Sequence[Reference] = (),
        max_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
        on_token: OnToken | None = None,
    ) -> Answer:
        """Answer a question about a picture (or, with None, without one).

        `spatial_refs`: points (x, y) or boxes (x_min, y_min, x_max, y_max) in 0..1 that the question is about.
        `reasoning`: think first; the thoughts and the points they name are in `Answer.reasoning`.
        """
        options = self._options(max_tokens, temperature, seed, on_token)
        references = self._references(spatial_refs, image, reasoning)
        name = "query/reasoning" if reasoning else "query"
        images = [] if image is None else [image]
        request = self._begin("query", name, images, question=question, references=references)
        return request.answer(options, reasoning=reasoning)

    def detect(self, image: PictureLike, object: str, *, max_objects: int | None = None, **options: Any) -> Answer:
        """Find every `object`; `Answer.boxes`. Always greedy: the sampling options have no effect."""
        return self._regions("detect", image, object, max_objects, options)

    def point(self, image: PictureLike, object: str, *, max_objects: int | None = None, **options: Any) -> Answer:
        """Point at every `object`; `Answer.points`. Always greedy: the sampling options have no effect."""
        return self._regions("point", image, object, max_objects, options)

    def gaze(
        self,
        image: PictureLike,
        eye: tuple[float, float] | None = None,
        *,
        face: tuple[float, float, float, float] | None = None,
        **options: Any,
    ) -> Answer:
        """Where the person whose eye is at (x, y) looks: one point, or none where the model sees no target.

        With a `face` box (x_min, y_min, x_max, y_max) instead, twenty eyes are drawn from it (`seed`) and averaged.
        """
        self._sampling_options(options)
        if (eye is None) == (face is None):
            raise UsageError("gaze takes an eye (x, y) or a face (x_min, y_min, x_max, y_max)")

        def ask(pixels: PictureLike, at: tuple[float, float]) -> Answer:
            request = self._begin("gaze", "gaze", [pixels], eye=at)
            answer = request.regions(self._region(), sizes=False, most=1)
            # One target is all that is asked for: having found it is an end, not a cut.
            return replace(answer, finish="stop") if answer.points else answer

        if eye is not None:
            return ask(image, given.point("eye", eye))
        check_seed(options.get("seed"))
        answer, points = steady_gaze(ask, picture.load_picture(image), given.box("face", face), options.get("seed"))
        return replace(answer, points=points)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Answer:
        """Answer the last of `messages`: {"role": "user", "content": text or a list of pictures and text}.

        Raises UnsupportedError for more turns or pictures than the model was made for.
        """
        images, text = _only_turn(messages)
        if len(images) > 1:
            raise UnsupportedError(f"this model takes one picture at a time, the message has {len(images)}")
        return self.query(images[0] if images else None, text, **options)

    def stages(self, images: Sequence[PictureLike], prompt_ids: Sequence[int]) -> dict[str, F32]:
        """Every stage of one prefill, float32.

        `pixels` [n, 3, size, size], `features` [n, tokens, width], `projected` [image_tokens, width] (absent without a
        picture), `logits` [positions, vocab] of BOS, picture and `prompt_ids`, which follow the picture. Without a
        picture `prompt_ids` are everything, BOS included. Raises UsageError where there is neither.
        """
        if not images and not len(prompt_ids):
            raise UsageError("stages takes a picture, prompt ids, or both")
        out: dict[str, F32] = {}
        parts: list[tuple[int, ...] | Embedded] = []
        if images:
            start = prompt.template(self.spec.prompt, next(iter(self.spec.prompt.templates)))
            parts += [p.ids for p in start[:1] if isinstance(p, Ids)]
        for image in images:
            crops = imaging.crop(picture.load_picture(image), self.spec.image)
            out["pixels"] = imaging.normalise(crops.pixels, self.spec.image)
            out["features"] = self._features(crops)
            out["projected"] = self.session.project(out["features"], crops.tiling)
            parts.append(Embedded("stages", out["projected"]))
        before = self._conversation.begin(Prefix(tuple(parts)), every=True)
        logits = [] if before is None else [before.logits]
        if len(prompt_ids):
            logits.append(self._conversation.ask([tuple(map(int, prompt_ids))], every=True).logits)
        out["logits"] = np.concatenate(logits)
        return out

    def follow(self, image: PictureLike, question: str | None, tokens: Sequence[int]) -> F32:
        """Logits float32 [len(tokens), vocab] before each of `tokens`, fed one by one as an answer to the question.

        `question` None: a caption. Banned tokens have -inf, as where an answer is chosen. It shows how a model goes on
        from another's words, so one early difference does not hide what comes after it.
        """
        name, skill = ("query", "query") if question is not None else ("caption/normal", "caption")
        request = self._begin(skill, name, [image], question=question or "")
        rows = [self._conversation.ask(request.parts).logits]
        rows += [self._conversation.ask([(int(token),)]).logits for token in tokens[:-1]]
        out = np.stack(rows)
        out[1:, list(self.spec.prompt.banned)] = -np.inf
        return out

    # ---- inside -----------------------------------------------------------------------------------------------

    def _begin(
        self,
        skill: str,
        name: str,
        images: Sequence[PictureLike],
        *,
        question: str = "",
        thing: str = "",
        references: Sequence[Reference] = (),
        eye: tuple[float, float] | None = None,
    ) -> Request:
        clock = Clock()
        with clock.stage("tokenize"):
            segments = prompt.render(
                self.spec.prompt,
                name,
                self.tokenizer,
                pictures=len(images),
                question=question,
                thing=thing,
                references=references,
                eye=eye,
            )
        cut = 1 + max((i for i, s in enumerate(segments) if isinstance(s, PictureSpan)), default=-1)
        counts = _positions(segments, self.spec.image_tokens)
        self._conversation.check(sum(counts), "the picture and the prompt" if images else "the prompt")
        encoded = [self._picture(image, clock) for image in images]
        prefix = Prefix(tuple(self._part(s, encoded) for s in segments[:cut]))
        with clock.stage("prefill"):
            self._conversation.begin(prefix)
        rest = [self._part(s, encoded) for s in segments[cut:]]
        crops = sum(count for _, count in encoded)
        return Request(self.spec, self.tokenizer, self._conversation, skill, clock, rest, *counts, crops)

    def _picture(self, image: PictureLike, clock: Clock) -> tuple[Embedded, int]:
        with clock.stage("image"):
            pixels = picture.load_picture(image)
        with clock.stage("preprocess"):
            key = picture.digest(pixels)
        if key in self._encoded:
            self._encoded.move_to_end(key)
            return self._encoded[key]
        with clock.stage("preprocess"):
            crops = imaging.crop(pixels, self.spec.image)
        with clock.stage("vision"):
            features = self._features(crops)
        with clock.stage("project"):
            rows = self.session.project(features, crops.tiling)
        self._encoded[key] = (Embedded(key, rows), crops.count)
        if len(self._encoded) > _KEPT_PICTURES:
            self._encoded.popitem(last=False)
        return self._encoded[key]

    def _features(self, crops: imaging.Crops) -> F32:
        """Features of all crops; a single local crop equals the global one, which is then encoded once."""
        if crops.tiling == (1, 1):
            return np.repeat(self.session.vision(crops.pixels[:1]), 2, axis=0)
        return self.session.vision(crops.pixels)

    def _part(self, segment: Segment, encoded: Sequence[tuple[Embedded, int]]) -> tuple[int, ...] | Embedded:
        if isinstance(segment, TokenRun):
            return segment.ids
        if isinstance(segment, PictureSpan):
            return encoded[segment.index][0]
        return self._region().encoded(*segment.values)

    def _region(self) -> RegionDecoder:
        if self.spec.region is None:
            raise UnsupportedError(f"{self.spec.family} has no region heads: no detect, point or spatial references")
        return RegionDecoder(self.spec.region, self._conversation)

    def _regions(self, name: str, image: PictureLike, thing: str, most: int | None, options: dict[str, Any]) -> Answer:
        self._sampling_options(options)
        most = given.count("max_objects", most, self.spec.prompt.max_objects)
        request = self._begin(name, name, [image], thing=thing)
        return request.regions(self._region(), sizes=name == "detect", most=most)

    def _references(self, references: Sequence[Reference], image: object, reasoning: bool) -> list[Reference]:
        if not len(references):
            return []
        if self.spec.prompt.coordinate is None:
            raise UnsupportedError("this release has no spatial references; they came with moondream2 2025-06-21")
        if image is None:
            raise UsageError("spatial references need a picture")
        checked = [given.reference(r) for r in references]
        if reasoning:
            raise UnsupportedError(
                "reasoning with spatial references does not work in the original either; ask without one"
            )
        return checked

    def _options(
        self, max_tokens: int | None, temperature: float, seed: int | None, on_token: OnToken | None
    ) -> Options:
        most = given.count("max_tokens", max_tokens, self.spec.prompt.max_tokens)
        return Options(most, Sampler(temperature, self.spec.prompt.top_p, seed), on_token)

    @staticmethod
    def _sampling_options(options: Mapping[str, Any]) -> None:
        for name in options:
            if name not in ("max_tokens", "temperature", "seed", "on_token"):
                raise TypeError(f"unexpected option '{name}'")


def _positions(segments: Sequence[Segment], image_tokens: int) -> tuple[int, int]:
    """Positions of text and slots, and of pictures."""
    text = sum(len(s.ids) if isinstance(s, TokenRun) else isinstance(s, Slot) for s in segments)
    return text, image_tokens * sum(isinstance(s, PictureSpan) for s in segments)


def _only_turn(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Any], str]:
    if len(messages) != 1 or messages[0].get("role") != "user":
        raise UnsupportedError("this model was trained on single questions: chat takes one message of the role 'user'")
    content = messages[0].get("content")
    if isinstance(content, str):
        return [], content
    if not isinstance(content, Sequence):
        raise UsageError("a message's content is a text, or a list of pictures and one text (last)")
    # A path is a text too: the last text is the question, everything before it is a picture.
    *images, text = content if content else [""]
    if not isinstance(text, str) or not text:
        raise UsageError("a message ends with its text")
    return list(images), text
