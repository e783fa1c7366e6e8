"""Asking a model and timing it: warm-up, samples, then what is computed apart because it would disturb the clock."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from vlmedge.answer import Answer
from vlmedge.device_bench.job import Ask, Work
from vlmedge.device_bench.result import Counts, Sample
from vlmedge.device_bench.stopwatch import Stopwatch
from vlmedge.errors import UnsupportedError
from vlmedge.picture import PictureLike, load_picture
from vlmedge.prompt import TextStream
from vlmedge.session import F32
from vlmedge.skills import Model

_WARM = 8  # tokens
# Answer.timings_ms -> Sample.ms
_STAGES = ("image", "preprocess", "vision", "project", "tokenize", "prefill", "prompt", "first_token")


@dataclass
class Asked:
    """What came of a work: its samples in order, and of each ask its counts and its tokens."""

    samples: list[Sample] = field(default_factory=list)
    counts: dict[str, Counts] = field(default_factory=dict)
    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)


class Subject:
    """An opened model, asked so that nothing of the last question is remembered and nothing ends an answer early."""

    def __init__(self, model: Model) -> None:
        """Take a model; its session is used through a stopwatch from now on."""
        self.model = model
        self.watch = Stopwatch(model.session)
        forced = replace(model.spec.prompt, stop=())
        self._spec = replace(model.spec, prompt=forced)
        self._last = self.fresh()  # an older one would not know what is in the KV cache now

    def fresh(self) -> Model:
        """The model without any picture or prompt in its memory; a stop token does not stop it."""
        return Model(self._spec, self.watch, self.model.tokenizer)

    def warm_up(self, work: Work) -> None:
        """Answer the first ask's question about a grey picture of one crop, as often as the work says."""
        size = self._spec.image.size
        grey = np.full((size, size, 3), 128, np.uint8)
        for _ in range(work.warmup):
            _answer(self.fresh(), work.asks[0], min(work.tokens, _WARM), grey)

    def measure(self, work: Work) -> Asked:
        """Answer every ask `repeat` times in turn, and on until `min_seconds` (or `minutes`) are over."""
        out, began = Asked(), time.perf_counter()
        for _ in self._turns(work, began):
            for ask in work.asks:
                out.samples.append(self._sample(ask, work, time.perf_counter() - began, out))
        return out

    def follow(self, ask: Ask, tokens: Sequence[int]) -> F32:
        """Logits float32 [tokens, vocab] along an answer; the picture that was asked about last is still encoded."""
        return self._last.follow(ask.picture, ask.question or None, tokens)

    def _turns(self, work: Work, began: float) -> Iterator[int]:
        least = max(work.min_seconds, work.minutes * 60)
        turn = 0
        while turn < work.repeat or time.perf_counter() - began < least:
            yield turn
            turn += 1

    def _sample(self, ask: Ask, work: Work, at: float, out: Asked) -> Sample:
        model = self.fresh()
        self.watch.reset()
        answer = _answer(model, ask, work.tokens, ask.picture)
        _check_length(answer, work.tokens, self.watch.context)
        ends = [call.end for call in self.watch.calls if call.name == "forward"][-len(answer.tokens) :]
        token_ms = tuple(round(float(ms), 4) for ms in np.diff(ends) * 1000)
        if ask.name not in out.tokens:
            out.tokens[ask.name], out.counts[ask.name] = answer.tokens, self._counts(ask, answer)
        ms = {stage: answer.timings_ms[stage] for stage in _STAGES if stage in answer.timings_ms}
        ms |= {"decode": round(float(np.mean(token_ms)), 4)} if token_ms else {}
        ms |= {"end_to_end": answer.timings_ms["total"], "detokenize": self._detokenize(answer)}
        ms["next_first_token"] = self._next(model, ask)
        self._last = model
        return Sample(ask.name, round(at, 4), ms, () if work.minutes else token_ms)

    def _counts(self, ask: Ask, answer: Answer) -> Counts:
        encoded = sum(call.size for call in self.watch.calls if call.name == "vision")
        return Counts(ask.name, answer.crops, encoded, answer.image_tokens, answer.prompt_tokens, len(answer.tokens))

    def _detokenize(self, answer: Answer) -> float:
        """Milliseconds of turning the whole answer into text, token by token as a user sees it."""
        start, stream = time.perf_counter(), TextStream(self.model.tokenizer)
        for token in answer.tokens:
            stream.push(token)
        stream.finish()
        return round((time.perf_counter() - start) * 1000, 4)

    def _next(self, model: Model, ask: Ask) -> float:
        """Time to the first token of one more question about the picture that is in the KV cache, pixels in hand."""
        return _answer(model, ask, 1, load_picture(ask.picture)).timings_ms["first_token"]


def _answer(model: Model, ask: Ask, tokens: int, picture: PictureLike) -> Answer:
    if ask.question:
        return model.query(picture, ask.question, max_tokens=tokens)
    return model.caption(picture, max_tokens=tokens)


def _check_length(answer: Answer, wanted: int, context: int) -> None:
    """Figures of answers of unlike lengths are not compared."""
    if len(answer.tokens) != wanted:
        raise UnsupportedError(
            f"{wanted} tokens do not fit behind {answer.prompt_tokens + answer.image_tokens} positions in a context of "
            f"{context}; use a scenario with fewer tokens, or a larger --context"
        )
