"""moondream2's config.json: the tables that upstream's code knows, their defaults, and what cannot be meant.

Facts from vikhyat/moondream at 44146f1 (`moondream/torch/config.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vlmedge.errors import CheckpointError, UnsupportedError
from vlmedge.records import decode

HEAD_DIM = 64  # upstream's rotary code is written for this head width
LARGEST = 1 << 20  # beyond any real dimension; stops absurd configs before anything is allocated


@dataclass(frozen=True, slots=True)
class TextConfig:
    """`config.text`; the defaults are those of the 2B model.

    Without `n_kv_heads` every head has its own keys and values. Upstream's newest code would take 32 there, which its
    own 0.5B config (16 heads) cannot mean: that is older than grouped-query attention.
    """

    dim: int = 2048
    ff_dim: int = 8192
    n_layers: int = 24
    vocab_size: int = 51200
    max_context: int = 2048
    n_heads: int = 32
    n_kv_heads: int | None = None
    prefix_attn: int = 730
    group_size: int | None = None

    @property
    def kv_heads(self) -> int:
        """Heads that have keys and values."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads


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
class Frame:
    """The ids before and behind a question or an object."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Templates:
    """`config.tokenizer.templates`; null (or absence) means that the model lacks the skill."""

    caption: dict[str, tuple[int, ...]] | None = None
    query: Frame | None = None
    detect: Frame | None = None
    point: Frame | None = None


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """`config.tokenizer`; a key that is absent has its release's value. Control tokens are those of 2025-06-21."""

    bos_id: int | None = None
    eos_id: int | None = None
    answer_id: int = 3
    thinking_id: int = 4
    coord_id: int = 5
    size_id: int = 6
    start_ground_points_id: int = 7
    end_ground_id: int = 9
    templates: Templates | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """The `config` table of config.json; empty in published releases."""

    text: TextConfig = TextConfig()
    vision: VisionConfig = VisionConfig()
    region: RegionConfig = RegionConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()


def read_config(data: Mapping[str, Any]) -> Config:
    """Decode and check `config.json`; raises CheckpointError for what cannot be meant, UnsupportedError for int4."""
    config = decode(Config, data.get("config") or {}, "config", CheckpointError)
    _check(config)
    return config


def _check(config: Config) -> None:
    text, vision, region = config.text, config.vision, config.region
    if text.group_size is not None or region.group_size is not None:
        raise UnsupportedError(
            "this is the int4 release (group_size); export from the bf16 or f16 one and let vlmedge quantize"
        )
    for where, table in (("text", text), ("vision", vision), ("region", region)):
        for field in fields(table):
            value = getattr(table, field.name)
            least = 0 if field.name in ("overlap_margin", "group_size") else 1
            if value is not None and not least <= value <= _LIMITS.get(field.name, LARGEST):
                limit = _LIMITS.get(field.name, LARGEST)
                raise CheckpointError(f"config.{where}.{field.name} is {value}, outside {least}..{limit}")
    if text.n_heads * HEAD_DIM != text.dim:
        raise CheckpointError(f"config.text: {text.n_heads} heads of {HEAD_DIM} do not make dim {text.dim}")
    if text.n_heads % text.kv_heads:
        raise CheckpointError(f"config.text.n_kv_heads {text.kv_heads} does not divide n_heads {text.n_heads}")
    if vision.enc_dim % vision.enc_n_heads:
        raise CheckpointError(
            f"config.vision.enc_n_heads {vision.enc_n_heads} does not divide enc_dim {vision.enc_dim}"
        )
    _check_pictures(config)
    if vision.proj_out_dim != text.dim or region.dim != text.dim:
        raise CheckpointError("config: vision.proj_out_dim, region.dim and text.dim must be equal")
    if region.size_out_dim % 2 or region.coord_feat_dim % 2 or region.size_feat_dim % 2:
        raise CheckpointError("config.region: size_out_dim, coord_feat_dim and size_feat_dim must be even")


_LIMITS = {"n_layers": 1024, "enc_n_layers": 1024, "max_crops": 1024}


def _check_pictures(config: Config) -> None:
    text, vision = config.text, config.vision
    if vision.in_channels != 3:
        raise CheckpointError(f"config.vision.in_channels is {vision.in_channels}; pictures have 3")
    patch, margin = vision.enc_patch_size, vision.overlap_margin
    if vision.crop_size % patch or vision.crop_size <= 2 * margin * patch:
        raise CheckpointError(
            "config.vision: crop_size must be a multiple of enc_patch_size and larger than both overlap margins"
        )
    prefix = 1 + (vision.crop_size // patch) ** 2
    if text.max_context <= prefix:
        raise CheckpointError(
            f"config.text.max_context is {text.max_context}, a picture alone takes {prefix} positions"
        )
