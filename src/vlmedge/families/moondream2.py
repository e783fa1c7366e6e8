"""moondream2 and its 0.5B sibling: releases with `model.{vision,text,region}.*` names (2025-01-09 to 2025-06-21).

Facts from vikhyat/moondream at 44146f1 (`moondream/torch/{vision,text,region,weights}.py`).
"""

from __future__ import annotations

import json
from dataclasses import replace

from vlmedge.checkpoint import Checkpoint
from vlmedge.errors import CheckpointError, UnsupportedError
from vlmedge.families import Family, KnownModel
from vlmedge.families.moondream2_config import HEAD_DIM, read_config
from vlmedge.families.moondream2_releases import NEWEST, NEWEST_COMMIT, RELEASES, prompt, release
from vlmedge.spec import DecoderSpec, ImageSpec, MlpProjector, ModelSpec, OverlapCrops, RegionSpec, VisionSpec
from vlmedge.weights import Rule, WeightMap

ROPE_DIMS = 32


def matches(checkpoint: Checkpoint) -> bool:
    """Own every config that says moondream; refuse the 2024 generation by name."""
    config = checkpoint.config
    architectures = config.get("architectures")
    kinds = [str(config.get("model_type", "")), *map(str, architectures if isinstance(architectures, list) else [])]
    if not any(kind in ("moondream1", "HfMoondream", "Moondream") for kind in kinds):
        return False
    if "text_config" in config or "phi_config" in config or "Moondream" in kinds:
        raise UnsupportedError(
            f"{checkpoint.source.label} is a 2024 release of moondream2 (another architecture: no prefix attention, no "
            "detect and point); use vikhyatk/moondream2@2025-06-21, or another revision of 2025"
        )
    return True


def spec(checkpoint: Checkpoint) -> ModelSpec:
    """Describe the checkpoint; raises CheckpointError for a config that cannot be meant."""
    config = read_config(checkpoint.config)
    text, vision, region = config.text, config.vision, config.region
    found = RELEASES[release(checkpoint, config)]
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
            kv_heads=text.kv_heads,
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
        prompt=prompt(found, config.tokenizer, text.vocab_size),
    )


def weights(model: ModelSpec) -> WeightMap:
    """The table of tensor names (upstream's `weights.py`; packed qkv is [q | k | v])."""
    return WeightMap(RULES, model.tensors(), prefix="model.")


def tokenizer(checkpoint: Checkpoint) -> bytes:
    """Return the bytes of the right tokenizer.json.

    The file inside the 2025-06-21 repository is the GPT-2 one of older releases; the weights were trained
    with moondream/starmie-v1. Told apart by content: starmie has <|md_reserved_0|> as id 1. Older releases took
    theirs from an earlier revision, which is done here where the folder has none.
    """
    own = checkpoint.text("tokenizer.json")
    found = release(checkpoint, read_config(checkpoint.config))
    if found != NEWEST:
        return _gpt2(checkpoint, found, own).encode()
    if own is not None and _is_starmie(own):
        return own.encode()
    why = "there is no tokenizer.json" if own is None else "its tokenizer.json is the stale GPT-2 one"
    fetched = checkpoint.fetch(STARMIE_REPO, STARMIE_REVISION, "tokenizer.json", why).read_text(encoding="utf-8")
    if not _is_starmie(fetched):
        raise CheckpointError(f"{STARMIE_REPO} did not give the starmie tokenizer (no <|md_reserved_0|> with id 1)")
    return fetched.encode()


def _gpt2(checkpoint: Checkpoint, found: str, own: str | None) -> str:
    """The tokenizer of a release before 2025-06-21, whatever its content, but for starmie."""
    revision = GPT2_REVISIONS[found]
    text = own
    if text is None:
        why = f"there is no tokenizer.json, and the release {found} takes that of the revision {revision}"
        path = checkpoint.fetch(MODEL.repo, revision, "tokenizer.json", why)
        text = path.read_text(encoding="utf-8")
    if _is_starmie(text):
        raise CheckpointError(
            f"{checkpoint.source.label} is of the release {found}, its tokenizer.json is starmie of {NEWEST}; "
            f"put the tokenizer.json of {MODEL.repo}@{revision} into the folder"
        )
    return text


def _is_starmie(text: str) -> bool:
    try:
        added = {a["content"]: a["id"] for a in json.loads(text).get("added_tokens") or []}
    except (ValueError, TypeError, KeyError, AttributeError):
        return False
    return added.get("<|md_reserved_0|>") == 1 and added.get("<|endoftext|>") == 0


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
# Where upstream's code of each release takes its tokenizer from (f74a121, 8ac77eb: `moondream/torch/moondream.py`).
GPT2_REVISIONS = {"2025-01-09": "2024-08-26", "2025-04-14": "2025-01-09"}
MODEL = KnownModel(
    name="moondream2",
    repo="vikhyatk/moondream2",
    revision=NEWEST_COMMIT,
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
