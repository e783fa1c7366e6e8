"""Feeding a session and sampling from it: one KV cache, rewound to the picture for every new question."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vlmedge.errors import ContextError, UsageError
from vlmedge.session import F32, Session, Step

Finish = Literal["stop", "length"]
COLDEST = 1e-3  # logits over less than this leave the range of floats


@dataclass(frozen=True, slots=True)
class Embedded:
    """Positions that are given as embeddings float32 [n, width]; `key` tells equal ones apart."""

    key: str
    rows: F32


@dataclass(frozen=True, slots=True)
class Prefix:
    """What stands before the question and is kept: token ids and embedded pictures, in order."""

    parts: tuple[tuple[int, ...] | Embedded, ...]

    @property
    def key(self) -> str:
        """Equal prefixes have equal keys."""
        return "|".join(p.key if isinstance(p, Embedded) else ",".join(map(str, p)) for p in self.parts)

    @property
    def length(self) -> int:
        """Positions."""
        return sum(len(p.rows) if isinstance(p, Embedded) else len(p) for p in self.parts)


class Conversation:
    """The state of one session's KV cache: which prefix it holds, and where a question begins.

    A question always starts from the end of the prefix, so an answer does not depend on what was asked before.
    `longest`: the model's own context, where the session was opened with a shorter one.
    """

    def __init__(self, session: Session, bidirectional_prefix: bool, longest: int | None = None) -> None:
        self.session = session
        self._longest = longest
        self._bidirectional = bidirectional_prefix
        self._held: tuple[str, int] = ("", 0)

    def begin(self, prefix: Prefix, *, every: bool = False) -> Step | None:
        """Make the cache hold exactly the prefix; encode it only where it is not there yet.

        With `every` the prefix is encoded again and its logits are returned.
        """
        if self._held == (prefix.key, prefix.length) and self.session.position >= prefix.length and not every:
            self.session.rewind(prefix.length)
            return None
        self._held = ("", 0)
        self.session.rewind(0)
        step = None
        if prefix.parts:
            has_picture = any(isinstance(p, Embedded) for p in prefix.parts)
            step = self.session.forward(
                self._rows(prefix.parts), bidirectional=self._bidirectional and has_picture, every=every
            )
        self._held = (prefix.key, prefix.length)
        return step

    def ask(self, parts: Sequence[tuple[int, ...] | Embedded], *, hidden: bool = False, every: bool = False) -> Step:
        """Append a question behind the prefix (or behind what was appended since) and return its last step."""
        if all(isinstance(p, tuple) for p in parts):
            ids = np.array([i for p in parts if isinstance(p, tuple) for i in p], np.int32)
            return self.session.forward(ids, hidden=hidden, every=every)
        return self.session.forward(self._rows(parts), hidden=hidden, every=every)

    def check(self, positions: int, what: str) -> None:
        """Raise ContextError, with the numbers, where a request cannot fit."""
        context, longest = self.session.context, self._longest
        if positions < context:
            return
        known, remedy = f"the model's context is {context}", "shorten the question"
        if longest is not None and context < longest:
            known = f"the context was set to {context} of the model's {longest}"
            remedy = "give a larger --context, or shorten the question"
        raise ContextError(f"{what} takes {positions} positions and leaves none for an answer: {known}; {remedy}")

    def _rows(self, parts: Sequence[tuple[int, ...] | Embedded]) -> F32:
        rows = [p.rows if isinstance(p, Embedded) else self.session.embed(np.array(p, np.int32)) for p in parts]
        return np.concatenate(rows)


def check_seed(seed: int | None) -> None:
    """Raise UsageError for a seed that numpy would not take."""
    if seed is not None and seed < 0:
        raise UsageError(f"seed must be 0 or more, not {seed}")


class Sampler:
    """Chooses tokens: greedy at temperature 0, else from the smallest set of tokens that holds `top_p`.

    Raises UsageError for a temperature that is neither 0 nor a number of at least 0.001, or a negative seed.
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int | None = None) -> None:
        if temperature != 0 and not COLDEST <= temperature < math.inf:
            raise UsageError(f"temperature must be 0 (greedy) or at least {COLDEST}, not {temperature}")
        check_seed(seed)
        self._temperature, self._top_p = temperature, top_p
        self._random = np.random.default_rng(seed)

    def choose(self, logits: F32) -> int:
        """One token id from logits float32 [vocab]."""
        if self._temperature == 0:
            return int(np.argmax(logits))
        scaled = logits.astype(np.float64) / self._temperature
        odds = np.exp(scaled - scaled.max())
        odds /= odds.sum()
        order = np.argsort(-odds, kind="stable")
        ranked = odds[order]
        # Upstream keeps a token whose predecessors hold at most top_p together, so the first always stays.
        ranked[np.cumsum(ranked) - ranked > self._top_p] = 0.0
        return int(order[self._random.choice(len(ranked), p=ranked / ranked.sum())])


@dataclass(frozen=True, slots=True)
class Generated:
    """Token ids (the end token included, where one ended it) and why it stopped."""

    ids: tuple[int, ...]
    finish: Finish


def generate(
    conversation: Conversation,
    first: Step,
    *,
    stop: Sequence[int],
    banned: Sequence[int],
    max_tokens: int,
    sampler: Sampler,
    feed: Callable[[int, Step], tuple[int, ...] | Embedded] | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Generated:
    """Sample until a stop token, `max_tokens`, or the end of the context.

    `banned` tokens are excluded after the first. `feed(token, step)` may replace what a token feeds back
    (grounded reasoning feeds coordinates); steps then carry the hidden state, and a text cut by `max_tokens` has
    its last token in the cache too, because an answer follows it there.
    """
    session, step = conversation.session, first
    ids: list[int] = []
    banned_ids = list(banned)
    while True:
        if ids and banned_ids:
            step.logits[banned_ids] = -np.inf
        token = sampler.choose(step.logits)
        ids.append(token)
        if token in stop:
            return Generated(tuple(ids), "stop")
        if on_token is not None:
            on_token(token)
        if session.position >= session.context or (feed is None and len(ids) >= max_tokens):
            return Generated(tuple(ids), "length")
        step = conversation.ask([(token,) if feed is None else feed(token, step)], hidden=feed is not None)
        if len(ids) >= max_tokens:
            return Generated(tuple(ids), "length")
