"""moondream2's releases of 2025: what an empty config means in each, and the prompts that follow.

Facts from vikhyat/moondream at 44146f1, f74a121 and 8ac77eb (`moondream/torch/{config,moondream}.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from vlmedge.checkpoint import Checkpoint
from vlmedge.errors import CheckpointError, UnsupportedError
from vlmedge.families.moondream2_config import Config, Frame, Templates, TokenizerConfig
from vlmedge.spec import Coordinate, Ids, Image, PromptSpec, ReasoningSpec, References, Template, Text

NEWEST = "2025-06-21"
NEWEST_COMMIT = "9a7d4024050840e001defacec2b00727e89149e6"


@dataclass(frozen=True, slots=True)
class Release:
    """What one generation of releases means by an empty config: ids, templates, loops."""

    bos: int
    eos: int
    templates: Templates
    question: str
    thing: str
    size_scale: Literal["log2", "linear"]
    max_tokens: int
    control_tokens: bool


_GPT2 = Release(
    bos=50256,
    eos=50256,
    templates=Templates(
        caption={"short": (198, 198, 16438, 8305, 25), "normal": (198, 198, 24334, 1159, 25)},
        query=Frame((198, 198, 24361, 25), (198, 198, 33706, 25)),
        detect=Frame((198, 198, 47504, 25), (628,)),
        point=Frame((198, 198, 12727, 25), (628,)),
    ),
    question="{question}",
    thing="{object}",
    size_scale="linear",
    max_tokens=512,
    control_tokens=False,
)
_LONG = {"long": (198, 198, 14617, 8305, 25)}
RELEASES: dict[str, Release] = {
    "2025-01-09": _GPT2,
    "2025-04-14": replace(
        _GPT2,
        templates=replace(_GPT2.templates, caption={**(_GPT2.templates.caption or {}), **_LONG}),
        question=" {question}",
        thing=" {object}",
        size_scale="log2",
        max_tokens=768,
    ),
    "2025-06-21": Release(
        bos=0,
        eos=0,
        templates=Templates(
            caption={
                "short": (1, 32708, 2, 12492, 3),
                "normal": (1, 32708, 2, 6382, 3),
                "long": (1, 32708, 2, 4059, 3),
            },
            query=Frame((1, 15381, 2), (3,)),
            detect=Frame((1, 7235, 476, 2), (3,)),
            point=Frame((1, 2581, 2), (3,)),
        ),
        question="{question}",
        thing=" {object}",
        size_scale="log2",
        max_tokens=768,
        control_tokens=True,
    ),
}


def release(checkpoint: Checkpoint, config: Config) -> str:
    """Return the generation that the checkpoint's config stands for, a key of RELEASES.

    Decided by content: the ids in the config where they leave no choice, the revision, the config.py that lies
    beside the weights (read as text, never run), the config's other ids, at last the weights' dtype (bf16 since
    2025-06-21, f16 before).
    """
    tokenizer = config.tokenizer
    if tokenizer.bos_id == 0:
        return NEWEST
    if tokenizer.bos_id is not None and tokenizer.templates and "long" in (tokenizer.templates.caption or {}):
        return "2025-04-14"
    known = {NEWEST_COMMIT: NEWEST, "2025-03-27": "2025-04-14", "2025-04-15": "2025-04-14", **{r: r for r in RELEASES}}
    for name in (checkpoint.source.revision, checkpoint.source.commit):
        if name in known:
            return known[name]
    code = checkpoint.text("config.py")
    if code is not None:
        return NEWEST if "answer_id" in code else "2025-04-14" if '"long"' in code else "2025-01-09"
    if tokenizer.bos_id is not None:
        # Also the ids of upstream's own config_md2.json and config_md05.json, which its newest code reads otherwise.
        return "2025-01-09"
    if any(t.dtype == "f16" for t in checkpoint.tensors.values()):
        raise UnsupportedError(
            f"{checkpoint.source.label} has an empty config and f16 weights, which fits the releases 2025-01-09 and "
            "2025-04-14; name the revision (vikhyatk/moondream2@2025-04-14) or keep the release's config.py beside them"
        )
    return NEWEST


def prompt(found: Release, config: TokenizerConfig, vocab: int) -> PromptSpec:
    """Put the config's own templates (or the release's) into the vocabulary of `spec`.

    Raises CheckpointError for a token id that the model does not have.
    """
    bos = found.bos if config.bos_id is None else config.bos_id
    eos = found.eos if config.eos_id is None else config.eos_id
    spec = PromptSpec(
        templates=_templates(found, config, bos),
        stop=(eos,),
        banned=(config.answer_id,) if found.control_tokens else (),
        max_tokens=found.max_tokens,
        top_p=0.3,
        max_objects=50,
        coordinate=config.coord_id if found.control_tokens else None,
        reasoning=_reasoning(found, config, eos),
    )
    used = [i for t in spec.templates.values() for part in t if isinstance(part, Ids) for i in part.ids]
    for token in (*used, *spec.stop, *spec.banned):
        if not 0 <= token < vocab:
            raise CheckpointError(f"config.tokenizer names the token {token}, config.text.vocab_size is {vocab}")
    return spec


def _templates(found: Release, config: TokenizerConfig, bos: int) -> dict[str, Template]:
    own = config.templates or found.templates
    start: Template = (Ids((bos,)), Image())
    out: dict[str, Template] = {f"caption/{n}": (*start, Ids(ids)) for n, ids in (own.caption or {}).items()}
    question, thing = Text(found.question), Text(found.thing)
    if own.query is not None and found.control_tokens:
        # Upstream appends the suffix twice and the weights were trained with it (fact sheet 2.7).
        before: Template = (*start, Ids(own.query.prefix), References(), question, Ids(own.query.suffix))
        out["query"] = (*before, Ids(own.query.suffix))
        out["query/reasoning"] = (*before, Ids((config.thinking_id,)))
    elif own.query is not None:
        out["query"] = (*start, Ids(own.query.prefix), question, Ids(own.query.suffix))
    for name, frame in (("detect", own.detect), ("point", own.point)):
        if frame is not None:
            out[name] = (*start, Ids(frame.prefix), thing, Ids(frame.suffix))
    out["gaze"] = (*start, Text("\n\nPoint:"), Coordinate("x"), Coordinate("y"), Text(" gaze\n\n"))
    return out


def _reasoning(found: Release, config: TokenizerConfig, eos: int) -> ReasoningSpec | None:
    query = (config.templates or found.templates).query
    if not found.control_tokens or query is None:
        return None
    return ReasoningSpec(
        stop=config.answer_id,
        banned=(eos, config.size_id),
        coordinate=config.coord_id,
        chunk_starts=(config.start_ground_points_id, config.end_ground_id),
        answer=query.suffix,
    )
