"""One request: its picture is in the KV cache already, what remains is the prompt and the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vlmedge.answer import Answer, Box, Grounding, Point, Reasoning
from vlmedge.generate import Conversation, Embedded, Sampler, generate
from vlmedge.measure import Clock, peak_rss_mb
from vlmedge.prompt import TextStream, Tokenizer
from vlmedge.regions import RegionDecoder
from vlmedge.session import Step
from vlmedge.spec import ModelSpec

OnToken = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Options:
    """How to sample."""

    max_tokens: int
    sampler: Sampler
    on_token: OnToken | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt behind the prefix that `conversation` holds.

    `parts`: the prompt. `text_positions` counts it and what is not picture before it; `crops` those of the pictures.
    """

    spec: ModelSpec
    tokenizer: Tokenizer
    conversation: Conversation
    skill: str
    clock: Clock
    parts: Sequence[tuple[int, ...] | Embedded]
    text_positions: int
    image_positions: int
    crops: int

    def answer(self, options: Options, reasoning: bool = False) -> Answer:
        """Generate text, after thoughts where asked for; thoughts that fill the context leave the text empty."""
        rules = self.spec.prompt
        with self.clock.stage("prompt"):
            step = self.conversation.ask(self.parts, hidden=reasoning)
        thoughts = None
        if reasoning:
            assert rules.reasoning is not None, "a reasoning template comes with its rules"
            thoughts = self._think(step, options)
            session = self.conversation.session
            if session.position + len(rules.reasoning.answer) >= session.context:
                return self._finish(finish="length", reasoning=thoughts)  # the thoughts took all the room
            step = self.conversation.ask([rules.reasoning.answer])
        stream = TextStream(self.tokenizer)

        def show(piece: str) -> None:
            if piece and options.on_token is not None:
                options.on_token(piece)

        def token_done(token: int) -> None:
            self.clock.mark("first_token")
            show(stream.push(token))

        with self.clock.stage("decode"):
            out = generate(
                self.conversation,
                step,
                stop=rules.stop,
                banned=rules.banned,
                max_tokens=options.max_tokens,
                sampler=options.sampler,
                on_token=token_done,
            )
        show(stream.finish())
        text = self.tokenizer.decode([t for t in out.ids if t not in rules.stop])
        return self._finish(text=text, tokens=out.ids, finish=out.finish, reasoning=thoughts)

    def regions(self, region: RegionDecoder, *, sizes: bool, most: int) -> Answer:
        """Collect boxes (with sizes) or points."""
        stop = self.spec.prompt.stop
        with self.clock.stage("prompt"):
            step = self.conversation.ask(self.parts, hidden=True)
        tokens: list[int] = []
        boxes: list[Box] = []
        points: list[Point] = []
        with self.clock.stage("decode"):
            for token, found in region.objects(step, stop=stop, sizes=sizes, most=most):
                self.clock.mark("first_token")
                tokens.append(token)
                if isinstance(found, Box):
                    boxes.append(found)
                elif isinstance(found, Point):
                    points.append(found)
        ended = bool(tokens) and tokens[-1] in stop
        return self._finish(
            tokens=tuple(tokens), boxes=tuple(boxes), points=tuple(points), finish="stop" if ended else "length"
        )

    def _think(self, step: Step, options: Options) -> Reasoning:
        """Grounded reasoning: a coordinate token feeds back the coordinate that the hidden state holds."""
        rules = self.spec.prompt.reasoning
        assert rules is not None
        assert self.spec.region is not None, "reasoning is grounded in region heads"
        region = RegionDecoder(self.spec.region, self.conversation)
        chunks: list[tuple[list[int], list[float]]] = [([], [])]

        def feed(token: int, current: Step) -> tuple[int, ...] | Embedded:
            if token in rules.chunk_starts:
                chunks.append(([], []))
            chunks[-1][0].append(token)
            if token != rules.coordinate:
                return (token,)
            chunks[-1][1].append(region.coordinate(current))
            return region.encoded(chunks[-1][1][-1])

        with self.clock.stage("reasoning"):
            out = generate(
                self.conversation,
                step,
                stop=(rules.stop,),
                banned=rules.banned,
                max_tokens=options.max_tokens,
                sampler=options.sampler,
                feed=feed,
            )
        text, grounding = "", []
        for ids, values in chunks:
            piece = self.tokenizer.decode(ids)
            points = tuple(Point(x, y) for x, y in zip(values[::2], values[1::2], strict=False))
            if points:
                grounding.append(Grounding(len(text), len(text) + len(piece), points))
            text += piece
        return Reasoning(text, out.ids, tuple(grounding))

    def _finish(self, **fields: Any) -> Answer:
        self.clock.mark("total")
        return Answer(
            skill=self.skill,
            prompt_tokens=self.text_positions,
            image_tokens=self.image_positions,
            crops=self.crops,
            runtime=self.conversation.session.runtime,
            timings_ms=self.clock.rounded(),
            peak_rss_mb=peak_rss_mb(),
            **fields,
        )
