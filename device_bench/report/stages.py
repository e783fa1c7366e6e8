"""What is measured of an answer: the stages' names, units, and exactly what each one covers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from vlmedge.device_bench.result import Counts, Sample


@dataclass(frozen=True, slots=True)
class Stage:
    """A measured quantity: its `title`, its `unit` as a table has it, and what it covers."""

    title: str
    unit: str
    meaning: str


STAGES: Final = {
    "first_token": Stage(
        "first token", "ms", "TTFT: from the picture's file in hand to the first token out: all parts below together."
    ),
    "image": Stage("image", "ms", "The picture's file is decoded to RGB."),
    "preprocess": Stage("preprocess", "ms", "Cutting and resizing the picture into crops."),
    "vision": Stage("vision", "ms", "The vision tower over all crops of the picture."),
    "project": Stage("project", "ms", "Crops are joined and projected into the language model's space."),
    "tokenize": Stage("tokenize", "ms", "The question becomes token ids."),
    "prefill": Stage("prefill", "ms", "The language model reads the picture's positions."),
    "prompt": Stage("prompt", "ms", "The language model reads the question's positions; the first token is chosen."),
    "vision_crop": Stage("vision, per crop", "ms", "Vision divided by the crops that were encoded."),
    "decode": Stage("decode, per token", "ms", "The mean time of a token of an answer, the first excluded."),
    "decode_rate": Stage("decode", "tokens/s", "Tokens per second of an answer, the first excluded."),
    "token": Stage("each token", "ms", "Single tokens after the first, pooled: its p99 tells of stutter."),
    "detokenize": Stage("detokenize", "ms", "The answer's tokens become text; measured apart."),
    "next_first_token": Stage(
        "next question", "ms", "TTFT of another question about the same picture, which is in the KV cache already."
    ),
    "end_to_end": Stage("answer", "ms", "From the picture's file to the last token of the answer."),
}
# What the first token is made of, in the order in which it happens.
PARTS: Final = ("image", "preprocess", "vision", "project", "tokenize", "prefill", "prompt")
REST: Final = "rest"  # what no part covers
AFTER: Final = "decode"  # the tokens of an answer after the first


def values(sample: Sample, counts: Counts | None, stage: str) -> tuple[float, ...]:
    """What a sample says of a stage; empty where it was not measured."""
    if stage == "token":
        return sample.token_ms
    if stage == "decode_rate":
        time = sample.ms.get("decode")
        return (1000 / time,) if time else ()
    if stage == "vision_crop":
        time = sample.ms.get("vision")
        return (time / counts.encoded_crops,) if time is not None and counts and counts.encoded_crops else ()
    return (sample.ms[stage],) if stage in sample.ms else ()
