"""The blocks of `spec` as PyTorch modules; parameters carry canonical names, q, k and v packed into one matrix."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmedge.spec import Activation, DecoderSpec, MlpProjector, RegionSpec, VisionSpec

_GELU_TANH = nn.GELU(approximate="tanh")


def activate(kind: Activation, x: Tensor) -> Tensor:
    """Apply an activation by its declared name."""
    if kind == "gelu_tanh":
        return cast(Tensor, _GELU_TANH(x))
    if kind == "gelu":
        return F.gelu(x)
    if kind == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.silu(x)


class Mlp(nn.Module):
    """`down(activation(up x))`, or with a gate `down(activation(gate x) * up x)`."""

    def __init__(self, inner: int, width: int, activation: Activation, gated: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(width, inner, bias)
        self.down = nn.Linear(inner, width, bias)
        self.gate = nn.Linear(width, inner, bias) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        if self.gate is None:
            return cast(Tensor, self.down(activate(self.activation, self.up(x))))
        return cast(Tensor, self.down(activate(self.activation, self.gate(x)) * self.up(x)))


class Head(nn.Module):
    """Two linear layers with an activation between, of three widths."""

    def __init__(self, source: int, inner: int, target: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(source, inner)
        self.down = nn.Linear(inner, target)

    def forward(self, x: Tensor) -> Tensor:
        """[..., source] -> [..., target]."""
        return cast(Tensor, self.down(activate(self.activation, self.up(x))))


class VisionAttention(nn.Module):
    """Full self-attention without a mask."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.heads = spec.heads
        self.qkv = nn.Linear(spec.width, 3 * spec.width)
        self.out = nn.Linear(spec.width, spec.width)

    def forward(self, x: Tensor) -> Tensor:
        """[n, tokens, width] -> [n, tokens, width]."""
        n, t, w = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return cast(Tensor, self.out(mixed.transpose(1, 2).reshape(n, t, w)))


class VisionLayer(nn.Module):
    """One pre-norm block."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.width, eps=spec.norm_eps)
        self.attn = VisionAttention(spec)
        self.norm2 = nn.LayerNorm(spec.width, eps=spec.norm_eps)
        self.mlp = Mlp(spec.mlp_width, spec.width, spec.activation)

    def forward(self, x: Tensor) -> Tensor:
        """[n, tokens, width] -> [n, tokens, width]."""
        x = x + self.attn(self.norm1(x))
        return cast(Tensor, x + self.mlp(self.norm2(x)))


class Tower(nn.Module):
    """The vision transformer: normalised pixels [n, 3, size, size] -> features [n, tokens, width]."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.patch = nn.Conv2d(spec.channels, spec.width, spec.patch_size, spec.patch_size)
        self.position = nn.Parameter(torch.zeros(spec.tokens, spec.width))
        self.layers = nn.ModuleList(VisionLayer(spec) for _ in range(spec.layers))
        self.post_norm = nn.LayerNorm(spec.width, eps=spec.norm_eps) if spec.post_norm else None

    def forward(self, pixels: Tensor) -> Tensor:
        """[n, 3, size, size] -> [n, tokens, width]."""
        x = self.patches(pixels)
        for layer in self.layers:
            x = layer(x)
        return self.normed(x)

    def patches(self, pixels: Tensor) -> Tensor:
        """What goes into the first layer."""
        return cast(Tensor, self.patch(pixels).flatten(2).transpose(1, 2) + self.position)

    def normed(self, x: Tensor) -> Tensor:
        """What comes of the last layer's output."""
        return x if self.post_norm is None else cast(Tensor, self.post_norm(x))


def projector(spec: MlpProjector, vision: VisionSpec, width: int) -> Head:
    """Build the projector: [tokens, (2 *) vision width] -> [tokens, width]."""
    return Head(vision.width * (2 if spec.joins_global else 1), spec.hidden, width, spec.activation)


class DecoderAttention(nn.Module):
    """Self-attention with rotary positions and grouped keys and values."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self.qkv = nn.Linear(spec.width, q + 2 * kv, spec.bias)
        self.out = nn.Linear(q, spec.width, spec.bias)

    def forward(self, x: Tensor, rope: Tensor, cache: LayerCache | None, mask: Tensor | None, causal: bool) -> Tensor:
        """[n, t, width] -> [n, t, width]; `rope` holds cos and sin [2, t, rope_dims / 2] of these positions."""
        s = self.spec
        n, t, _ = x.shape
        packed = self.qkv(x).view(n, t, s.heads + 2 * s.kv_heads, s.head_dim).transpose(1, 2)
        q, k, v = packed.split([s.heads, s.kv_heads, s.kv_heads], dim=1)
        q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            k, v = cache.append(k, v)
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=s.kv_heads != s.heads
        )
        return cast(Tensor, self.out(mixed.transpose(1, 2).reshape(n, t, -1)))


class LayerCache:
    """Preallocated keys and values of one layer, [1, kv_heads, context, head_dim] each."""

    def __init__(self, spec: DecoderSpec, dtype: torch.dtype, device: torch.device) -> None:
        shape = (1, spec.kv_heads, spec.context, spec.head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write behind the live positions; return views of all live keys and values."""
        end = self.length + k.shape[2]
        self.k[:, :, self.length : end] = k
        self.v[:, :, self.length : end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


def rope_table(spec: DecoderSpec) -> Tensor:
    """Cos and sin float32 [2, context, rope_dims / 2]; theta_i = rope_theta ** (-2 i / rope_dims)."""
    powers = torch.arange(0, spec.rope_dims, 2, dtype=torch.float32) / spec.rope_dims
    angles = torch.outer(torch.arange(spec.context, dtype=torch.float32), 1.0 / spec.rope_theta**powers)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the leading dims of x [n, heads, t, head_dim] in pairs (i, i + half), in float32."""
    half = rope.shape[-1]
    a, b = x[..., :half].float(), x[..., half : 2 * half].float()
    cos, sin = rope[0], rope[1]
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
    return turned if 2 * half == x.shape[-1] else torch.cat([turned, x[..., 2 * half :]], dim=-1)


class DecoderLayer(nn.Module):
    """One block; parallel (one norm, two branches) or sequential (two norms)."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.norm1 = norm(spec)
        self.norm2 = None if spec.parallel_residual else norm(spec)
        self.attn = DecoderAttention(spec)
        self.mlp = Mlp(spec.mlp_width, spec.width, spec.activation, spec.gated, spec.bias)

    def forward(self, x: Tensor, rope: Tensor, cache: LayerCache | None, mask: Tensor | None, causal: bool) -> Tensor:
        """[n, t, width] -> [n, t, width]."""
        h = self.norm1(x)
        mixed = self.attn(h, rope, cache, mask, causal)
        if self.norm2 is None:
            return cast(Tensor, x + mixed + self.mlp(h))
        x = x + mixed
        return cast(Tensor, x + self.mlp(self.norm2(x)))


def norm(spec: DecoderSpec) -> nn.Module:
    """The decoder's kind of norm."""
    kind = nn.LayerNorm if spec.norm == "layer" else nn.RMSNorm
    return kind(spec.width, eps=spec.norm_eps)


class Decoder(nn.Module):
    """Embedding, blocks, final norm and head."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed = nn.Embedding(spec.vocab, spec.width)
        self.layers = nn.ModuleList(DecoderLayer(spec) for _ in range(spec.layers))
        self.norm = norm(spec)
        self.head = None if spec.tied_head else nn.Linear(spec.width, spec.vocab, spec.head_bias)
        self.register_buffer("rope", rope_table(spec), persistent=False)

    def forward(
        self,
        x: Tensor,
        start: int = 0,
        caches: list[LayerCache] | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Embeddings [n, t, width] at positions start.. -> hidden [n, t, width] before the final norm.

        `mask`: bool, true where a query (row) sees a key (column); with neither mask nor `causal` all see all.
        `positions`: int64 [n, t] where they do not simply count up from `start`.
        """
        table = cast(Tensor, self.rope)
        rope = table[:, start : start + x.shape[1]] if positions is None else table[:, positions].unsqueeze(2)
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, None if caches is None else caches[i], mask, causal)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden [..., width] -> logits [..., vocab]."""
        h = self.norm(hidden)
        return cast(Tensor, F.linear(h, self.embed.weight) if self.head is None else self.head(h))


class Region(nn.Module):
    """Coordinates and sizes to embeddings and back."""

    def __init__(self, spec: RegionSpec, width: int) -> None:
        super().__init__()
        self.coord_features = nn.Parameter(torch.zeros(1, spec.coord_features // 2))
        self.size_features = nn.Parameter(torch.zeros(2, spec.size_features // 2))
        self.coord_encoder = nn.Linear(spec.coord_features, width)
        self.coord_decoder = Head(width, spec.hidden, spec.coord_bins, spec.activation)
        self.size_encoder = nn.Linear(spec.size_features, width)
        self.size_decoder = Head(width, spec.hidden, 2 * spec.size_bins, spec.activation)

    def encode_coordinate(self, x: Tensor) -> Tensor:
        """Coordinates [..., 1] in 0..1 -> embeddings [..., width]."""
        return cast(Tensor, self.coord_encoder(fourier(x, self.coord_features)))

    def encode_size(self, x: Tensor) -> Tensor:
        """Widths and heights [..., 2] in 0..1 -> embeddings [..., width]."""
        return cast(Tensor, self.size_encoder(fourier(x, self.size_features)))


def fourier(x: Tensor, frequencies: Tensor) -> Tensor:
    """Cos and sin of 2 pi x frequencies, joined."""
    f = 2 * torch.pi * x @ frequencies
    return torch.cat([f.cos(), f.sin()], dim=-1)
