"""moondream2 and its 0.5B sibling: releases with `model.{vision,text,region}.*` names (2025-01-09 to 2025-06-21).

Facts from vikhyat/moondream at 44146f1 (`moondream/torch/config.py`, `weights.py`, `moondream.py`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from typing import Literal

from vlmedge.checkpoint import Checkpoint
from vlmedge.errors import CheckpointError, UnsupportedError
from vlmedge.families import Family, KnownModel
from vlmedge.records import decode
from vlmedge.spec import (
    Coordinate,
    DecoderSpec,
    Ids,
    Image,
    ImageSpec,
    MlpProjector,
    ModelSpec,
    OverlapCrops,
    PromptSpec,
    ReasoningSpec,
    References,
    RegionSpec,
    Template,
    Text,
    VisionSpec,
)
from vlmedge.weights import Rule, WeightMap


@dataclass(frozen=True, slots=True)
class TextConfig:
    """`config.text`; the defaults are those of the 2B model."""

    dim: int = 2048
    ff_dim: int = 8192
    n_layers: int = 24
    vocab_size: int = 51200
    max_context: int = 2048
    n_heads: int = 32
    n_kv_heads: int = 32
    prefix_attn: int = 730
    group_size: int | None = None


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """`config.vision`."""

    enc_dim: int = 1152
    enc_patch_size: int = 14
    enc_n_layers: int = 27
    enc_ff_dim: int = 4304
    enc_n_heads: int = 16
    proj_out_dim: int = 2048
    crop_size: int = 378
    in_channels: int = 3
    max_crops: int = 12
    overlap_margin: int = 4
    proj_inner_dim: int = 8192


@dataclass(frozen=True, slots=True)
class RegionConfig:
    """`config.region`."""

    dim: int = 2048
    coord_feat_dim: int = 256
    coord_out_dim: int = 1024
    size_feat_dim: int = 512
    size_out_dim: int = 2048
    inner_dim: int = 8192
    group_size: int | None = None


@dataclass(frozen=True, slots=True)
class Release:
    """What one generation of releases means by an empty config: ids, templates, loops."""

    bos: int
    eos: int
    captions: dict[str, tuple[int, ...]]
    query: tuple[tuple[int, ...], tuple[int, ...]]
    detect: tuple[tuple[int, ...], tuple[int, ...]]
    point: tuple[tuple[int, ...], tuple[int, ...]]
    question: str
    thing: str
    size_scale: Literal["log2", "linear"]
    max_tokens: int
    control_tokens: bool


_GPT2 = Release(
    bos=50256,
    eos=50256,
    captions={"short": (198, 198, 16438, 8305, 25), "normal": (198, 198, 24334, 1159, 25)},
    query=((198, 198, 24361, 25), (198, 198, 33706, 25)),
    detect=((198, 198, 47504, 25), (628,)),
    point=((198, 198, 12727, 25), (628,)),
    question="{question}",
    thing="{object}",
    size_scale="linear",
    max_tokens=512,
    control_tokens=False,
)
RELEASES: dict[str, Release] = {
    # A fact of each generation, see the fact table in docs/families/moondream2.md.
    "2025-01-09": _GPT2,
    "2025-04-14": replace(
        _GPT2,
        captions={**_GPT2.captions, "long": (198, 198, 14617, 8305, 25)},
        question=" {question}",
        thing=" {object}",
        size_scale="log2",
        max_tokens=768,
    ),
    "2025-06-21": Release(
        bos=0,
        eos=0,
        captions={
            "short": (1, 32708, 2, 12492, 3),
            "normal": (1, 32708, 2, 6382, 3),
            "long": (1, 32708, 2, 4059, 3),
        },
        query=((1, 15381, 2), (3,)),
        detect=((1, 7235, 476, 2), (3,)),
        point=((1, 2581, 2), (3,)),
        question="{question}",
        thing=" {object}",
        size_scale="log2",
        max_tokens=768,
        control_tokens=True,
    ),
}


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """`config.tokenizer`; a key that is absent has its release's value. Ids of control tokens are those of 2025-06-21."""

    bos_id: int | None = None
    eos_id: int | None = None
    answer_id: int = 3
    thinking_id: int = 4
    coord_id: int = 5
    size_id: int = 6
    start_ground_points_id: int = 7
    end_ground_id: int = 9
    templates: dict[str, dict[str, tuple[int, ...]] | None] | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """The `config` table of config.json; empty in published releases."""

    text: TextConfig = TextConfig()
    vision: VisionConfig = VisionConfig()
    region: RegionConfig = RegionConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()


HEAD_DIM = 64  # upstream's rotary code is written for this head width
ROPE_DIMS = 32
LARGEST = 1 << 20  # beyond any real dimension; stops absurd configs before anything is allocated


def matches(checkpoint: Checkpoint) -> bool:
    """Own every config that says moondream; refuse the 2024 generation by name."""
    config = checkpoint.config
    kinds = [str(config.get("model_type", "")), *map(str, config.get("architectures") or [])]
    if not any(kind in ("moondream1", "HfMoondream", "Moondream") for kind in kinds):
        return False
    if "text_config" in config or "phi_config" in config or "Moondream" in kinds:
        raise UnsupportedError(
            f"{checkpoint.source.label} is a 2024 release of moondream2 (another architecture: no prefix attention, "
            "no detect and point); use vikhyatk/moondream2@2025-06-21, or another revision of 2025"
        )
    return True


def release(checkpoint: Checkpoint) -> str:
    """Return the generation that the checkpoint's empty config stands for, a key of RELEASES.

    Decided by content: the ids in the config, the revision, the config.py that lies beside the weights
    (read as text, never run), at last the weights' dtype (bf16 since 2025-06-21, f16 before).
    """
    tokenizer = (checkpoint.config.get("config") or {}).get("tokenizer") or {}
    if tokenizer.get("bos_id") is not None:
        templates = tokenizer.get("templates") or {}
        has_long = "long" in (templates.get("caption") or {})
        return "2025-06-21" if tokenizer["bos_id"] == 0 else "2025-04-14" if has_long else "2025-01-09"
    by_revision = {"2025-03-27": "2025-04-14", "2025-04-15": "2025-04-14", **{name: name for name in RELEASES}}
    by_revision[MODEL.revision] = "2025-06-21"
    if checkpoint.source.revision in by_revision:
        return by_revision[checkpoint.source.revision]
    code = checkpoint.text("config.py")
    if code is not None:
        return "2025-06-21" if "answer_id" in code else "2025-04-14" if '"long"' in code else "2025-01-09"
    if any(t.dtype == "f16" for t in checkpoint.tensors.values()):
        raise UnsupportedError(
            f"{checkpoint.source.label} has an empty config and f16 weights, which fits the releases 2025-01-09 and "
            "2025-04-14; name the revision (vikhyatk/moondream2@2025-04-14) or keep the release's config.py in the folder"
        )
    return "2025-06-21"


def spec(checkpoint: Checkpoint) -> ModelSpec:
    """Describe the checkpoint; raises CheckpointError for a config that cannot be meant."""
    config = decode(Config, checkpoint.config.get("config") or {}, "config", CheckpointError)
    _check(config)
    text, vision, region = config.text, config.vision, config.region
    found = RELEASES[release(checkpoint)]
    return ModelSpec(
        family="moondream2",
        vision=VisionSpec(
            layers=vision.enc_n_layers,
            width=vision.enc_dim,
            heads=vision.enc_n_heads,
            mlp_width=vision.enc_ff_dim,
            image_size=vision.crop_size,
            patch_size=vision.enc_patch_size,
            activation="gelu_tanh",
            norm_eps=1e-5,
            post_norm=True,
            channels=vision.in_channels,
        ),
        projector=MlpProjector(hidden=vision.proj_inner_dim, activation="gelu_tanh", joins_global=True),
        decoder=DecoderSpec(
            layers=text.n_layers,
            width=text.dim,
            heads=text.n_heads,
            kv_heads=text.n_kv_heads,
            head_dim=HEAD_DIM,
            mlp_width=text.ff_dim,
            vocab=text.vocab_size,
            context=text.max_context,
            norm="layer",
            norm_eps=1e-5,
            activation="gelu_tanh",
            gated=False,
            parallel_residual=True,
            rope_dims=ROPE_DIMS,
            rope_theta=10000.0,
            bias=True,
            head_bias=True,
            tied_head=False,
            bidirectional_prefix=True,
        ),
        region=RegionSpec(
            coord_features=region.coord_feat_dim,
            coord_bins=region.coord_out_dim,
            size_features=region.size_feat_dim,
            size_bins=region.size_out_dim // 2,
            hidden=region.inner_dim,
            activation="gelu_tanh",
            size_scale=found.size_scale,
        ),
        image=ImageSpec(
            size=vision.crop_size,
            patch_size=vision.enc_patch_size,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            resample="lanczos",
            tiling=OverlapCrops(max_crops=vision.max_crops, margin=vision.overlap_margin),
        ),
        prompt=_prompt(found, config.tokenizer),
    )


def weights(model: ModelSpec) -> WeightMap:
    """The table of tensor names (upstream's `weights.py`; packed qkv is [q | k | v])."""
    return WeightMap(RULES, model.tensors(), prefix="model.")


def tokenizer(checkpoint: Checkpoint) -> bytes:
    """Return the bytes of the right tokenizer.json.

    The file inside the 2025-06-21 repository is the GPT-2 one of older releases; the weights were trained
    with moondream/starmie-v1. Told apart by content: starmie has <|md_reserved_0|> as id 1.
    """
    own = checkpoint.text("tokenizer.json")
    if release(checkpoint) != "2025-06-21":
        if own is None:
            raise CheckpointError(f"{checkpoint.source.label} has no tokenizer.json")
        return own.encode()
    if own is not None and _is_starmie(own):
        return own.encode()
    fetched = checkpoint.fetch(STARMIE_REPO, STARMIE_REVISION, "tokenizer.json", why=(
        "the tokenizer.json of this checkpoint is the stale GPT-2 one" if own is not None else "there is no tokenizer.json"
    )).read_text(encoding="utf-8")
    if not _is_starmie(fetched):
        raise CheckpointError(f"{STARMIE_REPO} did not give the starmie tokenizer (no <|md_reserved_0|> with id 1)")
    return fetched.encode()


def _is_starmie(text: str) -> bool:
    try:
        added = {a["content"]: a["id"] for a in json.loads(text).get("added_tokens") or []}
    except (ValueError, TypeError, KeyError, AttributeError):
        return False
    return added.get("<|md_reserved_0|>") == 1 and added.get("<|endoftext|>") == 0


def _check(config: Config) -> None:
    text, vision, region = config.text, config.vision, config.region
    for where, table in (("text", text), ("vision", vision), ("region", region)):
        for field in fields(table):
            value = getattr(table, field.name)
            if value is not None and field.name != "group_size" and not 1 <= value <= LARGEST:
                low_ok = field.name == "overlap_margin" and value == 0
                if not low_ok:
                    raise CheckpointError(f"config.{where}.{field.name} is {value}, outside 1..{LARGEST}")
    if text.n_layers > 1024 or vision.enc_n_layers > 1024:
        raise CheckpointError("config asks for more than 1024 layers")
    if text.group_size is not None or region.group_size is not None:
        raise UnsupportedError("this is the int4 release (group_size); export from the bf16 or f16 one and let vlmedge quantize")
    if text.n_heads * HEAD_DIM != text.dim:
        raise CheckpointError(f"config.text: {text.n_heads} heads of {HEAD_DIM} do not make dim {text.dim}")
    if text.n_heads % text.n_kv_heads:
        raise CheckpointError(f"config.text.n_kv_heads {text.n_kv_heads} does not divide n_heads {text.n_heads}")
    if vision.enc_dim % vision.enc_n_heads:
        raise CheckpointError(f"config.vision.enc_n_heads {vision.enc_n_heads} does not divide enc_dim {vision.enc_dim}")
    if vision.crop_size % vision.enc_patch_size or vision.crop_size <= 2 * vision.overlap_margin * vision.enc_patch_size:
        raise CheckpointError("config.vision: crop_size must be a multiple of enc_patch_size and larger than both margins")
    if vision.proj_out_dim != text.dim or region.dim != text.dim:
        raise CheckpointError("config: vision.proj_out_dim, region.dim and text.dim must be equal")
    if region.size_out_dim % 2 or region.coord_feat_dim % 2 or region.size_feat_dim % 2:
        raise CheckpointError("config.region: size_out_dim, coord_feat_dim and size_feat_dim must be even")


def _prompt(found: Release, config: TokenizerConfig) -> PromptSpec:
    """Put the config's own templates (or the release's) into the vocabulary of `spec`."""
    bos = found.bos if config.bos_id is None else config.bos_id
    eos = found.eos if config.eos_id is None else config.eos_id
    own = config.templates or {}
    start: Template = (Ids((bos,)), Image())

    def framed(name: str, default: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        if name not in own:
            return None if own else default
        table = own[name]
        return None if table is None else (table["prefix"], table["suffix"])

    templates: dict[str, Template] = {}
    for length, ids in ((own.get("caption") or {}) if own else found.captions).items():
        templates[f"caption/{length}"] = (*start, Ids(ids))
    query, detect, point = (framed(name, getattr(found, name)) for name in ("query", "detect", "point"))
    if query is not None:
        before: Template = (*start, Ids(query[0]))
        if found.control_tokens:
            # Upstream appends the suffix twice and the weights were trained with it (fact sheet 2.7).
            before = (*before, References())
            templates["query/reasoning"] = (*before, Text(found.question), Ids((*query[1], config.thinking_id)))
            templates["query"] = (*before, Text(found.question), Ids((*query[1], *query[1])))
        else:
            templates["query"] = (*before, Text(found.question), Ids(query[1]))
    for name, frame in (("detect", detect), ("point", point)):
        if frame is not None:
            templates[name] = (*start, Ids(frame[0]), Text(found.thing), Ids(frame[1]))
    templates["gaze"] = (*start, Text("\n\nPoint:"), Coordinate("x"), Coordinate("y"), Text(" gaze\n\n"))
    reasoning = None
    if found.control_tokens and query is not None:
        reasoning = ReasoningSpec(
            stop=config.answer_id,
            banned=(eos, config.size_id),
            coordinate=config.coord_id,
            chunk_starts=(config.start_ground_points_id, config.end_ground_id),
            answer=query[1],
        )
    return PromptSpec(
        templates=templates,
        stop=(eos,),
        banned=(config.answer_id,) if found.control_tokens else (),
        max_tokens=found.max_tokens,
        top_p=0.3,
        max_objects=50,
        coordinate=config.coord_id if found.control_tokens else None,
        size=config.size_id if found.control_tokens else None,
        reasoning=reasoning,
    )


def _pair(source: str, *targets: str) -> tuple[Rule, Rule]:
    return (
        Rule(f"{source}.weight", tuple(f"{t}.weight" for t in targets)),
        Rule(f"{source}.bias", tuple(f"{t}.bias" for t in targets)),
    )


_V, _D = "vision.blocks.{i}", "text.blocks.{i}"
_VL, _DL = "vision.layers.{i}", "decoder.layers.{i}"
RULES: tuple[Rule, ...] = (
    *_pair("vision.patch_emb", "vision.patch"),
    Rule("vision.pos_emb", ("vision.position",)),
    *_pair(f"{_V}.ln1", f"{_VL}.norm1"),
    *_pair(f"{_V}.ln2", f"{_VL}.norm2"),
    *_pair(f"{_V}.attn.qkv", f"{_VL}.attn.q", f"{_VL}.attn.k", f"{_VL}.attn.v"),
    *_pair(f"{_V}.attn.proj", f"{_VL}.attn.out"),
    *_pair(f"{_V}.mlp.fc1", f"{_VL}.mlp.up"),
    *_pair(f"{_V}.mlp.fc2", f"{_VL}.mlp.down"),
    *_pair("vision.post_ln", "vision.post_norm"),
    *_pair("vision.proj_mlp.fc1", "projector.up"),
    *_pair("vision.proj_mlp.fc2", "projector.down"),
    Rule("text.wte", ("decoder.embed.weight",)),
    *_pair(f"{_D}.ln", f"{_DL}.norm1"),
    *_pair(f"{_D}.attn.qkv", f"{_DL}.attn.q", f"{_DL}.attn.k", f"{_DL}.attn.v"),
    *_pair(f"{_D}.attn.proj", f"{_DL}.attn.out"),
    *_pair(f"{_D}.mlp.fc1", f"{_DL}.mlp.up"),
    *_pair(f"{_D}.mlp.fc2", f"{_DL}.mlp.down"),
    *_pair("text.post_ln", "decoder.norm"),
    *_pair("text.lm_head", "decoder.head"),
    Rule("region.coord_features", ("region.coord_features",)),
    Rule("region.size_features", ("region.size_features",)),
    *_pair("region.coord_encoder", "region.coord_encoder"),
    *_pair("region.coord_decoder.fc1", "region.coord_decoder.up"),
    *_pair("region.coord_decoder.fc2", "region.coord_decoder.down"),
    *_pair("region.size_encoder", "region.size_encoder"),
    *_pair("region.size_decoder.fc1", "region.size_decoder.up"),
    *_pair("region.size_decoder.fc2", "region.size_decoder.down"),
    Rule(f"{_D}.kv_cache.k_cache", why="a cache, saved from a live model by the fine-tuning scripts"),
    Rule(f"{_D}.kv_cache.v_cache", why="a cache, saved from a live model by the fine-tuning scripts"),
    Rule("text.freqs_cis", why="a rotary table, computed from the config"),
    Rule("attn_mask", why="a mask, computed from the config"),
)

STARMIE_REPO = "moondream/starmie-v1"
STARMIE_REVISION = "35192e10a54e36eabe0a7cc57a2c1aab371cafc5"
MODEL = KnownModel(
    name="moondream2",
    repo="vikhyatk/moondream2",
    revision="9a7d4024050840e001defacec2b00727e89149e6",
    licence="Apache-2.0",
    summary="2B, release 2025-06-21: caption, query with reasoning, detect, point, gaze",
)
FAMILY = Family(
    name="moondream2",
    models=(
        MODEL,
        replace(MODEL, name="moondream2-2025-04-14", revision="2025-04-14", summary="2B, release 2025-04-14"),
        replace(MODEL, name="moondream2-2025-01-09", revision="2025-01-09", summary="2B, release 2025-01-09"),
    ),
    matches=matches,
    spec=spec,
    weights=weights,
    tokenizer=tokenizer,
)
