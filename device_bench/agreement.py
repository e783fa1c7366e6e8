"""How far a model's answers agree with the original's: its truth, written once, and what another model makes of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlmedge.device_bench.result import Agreement, AskAgreement
from vlmedge.errors import RuntimeFailedError
from vlmedge.prompt import Tokenizer
from vlmedge.records import decode
from vlmedge.session import F32

TOP = 64  # tokens of a position that the truth keeps; the rest of the distribution is one number
_LEAST = 1e-9  # probability of that rest: below it float32 logits say nothing


@dataclass(frozen=True, slots=True)
class AskTruth:
    """The original's greedy answer to one ask, forced to a length, and its distribution before each token.

    `ids` and `logprobs`, one row per token: the `TOP` most likely tokens, the likeliest first, and the natural
    logarithms of their probabilities.
    """

    ask: str
    tokens: tuple[int, ...]
    ids: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Truth:
    """What the original answers to a scenario's asks. `model` is its fingerprint."""

    model: str
    asks: tuple[AskTruth, ...]

    def of(self, ask: str) -> AskTruth:
        """The answer to one ask; raises RuntimeFailedError where it was not asked."""
        for found in self.asks:
            if found.ask == ask:
                return found
        raise RuntimeFailedError(f"the original was not asked '{ask}'; remove truth.json and run again")


@dataclass(frozen=True, slots=True)
class Followed:
    """A model along the truth's tokens: its own best token at each, and its log-probabilities of the truth's ids."""

    best: tuple[int, ...]
    logprobs: tuple[tuple[float, ...], ...]


def read_truth(path: str | Path) -> Truth:
    """Read the file that a run keeps; raises RuntimeFailedError for one that is damaged."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RuntimeFailedError(f"{path} cannot be read: {error}; remove it and run again") from None
    return decode(Truth, data, str(path), RuntimeFailedError)


def truth_of(ask: str, tokens: Sequence[int], logits: F32) -> AskTruth:
    """The truth of one ask from its tokens and the logits float32 [tokens, vocab] before each."""
    logprobs = _log_softmax(logits)
    top = np.argsort(-logprobs, axis=1, kind="stable")[:, :TOP]
    values = np.take_along_axis(logprobs, top, axis=1)
    rows = (tuple(float(f"{v:.6g}") for v in row if np.isfinite(v)) for row in values)
    kept = tuple(rows)
    ids = tuple(tuple(map(int, row[: len(some)])) for row, some in zip(top, kept, strict=True))
    return AskTruth(ask, tuple(map(int, tokens)), ids, kept)


def followed(truth: AskTruth, logits: F32) -> Followed:
    """What the truth needs of a model's logits float32 [tokens, vocab] along its tokens."""
    logprobs = _log_softmax(logits)
    values = (tuple(map(float, row[list(ids)])) for row, ids in zip(logprobs, truth.ids, strict=True))
    return Followed(tuple(map(int, logits.argmax(axis=1))), tuple(values))


def agreement(
    truth: Truth,
    answers: dict[str, Sequence[int]],
    along: dict[str, Followed],
    tokenizer: Tokenizer,
    stop: Sequence[int],
) -> Agreement:
    """Compare answers (ask -> tokens, greedy, forced to the truth's length) and `Followed` by ask with the truth."""
    asks = tuple(_one(truth.of(ask), tokens, along[ask], tokenizer, stop) for ask, tokens in answers.items())
    texts = "\0".join(found.text for found in asks)
    return Agreement(
        asks,
        sum(_judged(truth.of(found.ask), stop) for found in asks),
        _mean([found.top1 for found in asks]),
        _mean([found.kl for found in asks]),
        _mean([float(found.same_answer) for found in asks]),
        hashlib.sha256(texts.encode()).hexdigest(),
    )


def _one(
    truth: AskTruth, tokens: Sequence[int], along: Followed, tokenizer: Tokenizer, stop: Sequence[int]
) -> AskAgreement:
    wanted, got = _until(truth.tokens, stop), _until(tokens, stop)
    end = _judged(truth, stop)
    pairs = zip(truth.tokens[:end], tokens, strict=False)
    first = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
    same = [ids[0] == best for ids, best in zip(truth.ids[:end], along.best, strict=False)]
    kl = [_divergence(p, q) for p, q in zip(truth.logprobs[:end], along.logprobs, strict=False)]
    return AskAgreement(truth.ask, first, _mean(same), _mean(kl), wanted == got, tokenizer.decode(got))


def _judged(truth: AskTruth, stop: Sequence[int]) -> int:
    """Positions that count: up to the stop token. Behind it an answer goes on only because it is forced to."""
    return min(len(_until(truth.tokens, stop)) + 1, len(truth.tokens))


def _divergence(p: Sequence[float], q: Sequence[float]) -> float:
    """The divergence of q from p over the kept tokens and one rest: no more than the whole (log sum inequality)."""
    one, other = np.array(p), np.maximum(np.array(q), np.log(_LEAST))
    rest = max(1 - float(np.exp(one).sum()), _LEAST)
    other_rest = max(1 - float(np.exp(other).sum()), _LEAST)
    kept = float((np.exp(one) * (one - other)).sum())
    return max(0.0, kept + rest * float(np.log(rest / other_rest)))


def _until(tokens: Sequence[int], stop: Sequence[int]) -> list[int]:
    end = next((i for i, token in enumerate(tokens) if token in stop), len(tokens))
    return list(tokens[:end])


def _log_softmax(logits: F32) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Logarithms of probabilities. Raises RuntimeFailedError for logits that have none: NaN or infinite ones."""
    wide = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        wide -= wide.max(axis=1, keepdims=True)  # -inf stays: of a banned token
        out: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    if np.isnan(out).any():
        raise RuntimeFailedError("its logits are NaN or infinite, so its answers mean nothing; see 'vlmedge verify'")
    return out


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
