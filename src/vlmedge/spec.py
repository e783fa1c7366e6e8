"""What a vision-language model is made of: blocks as data, and the canonical name and shape of every tensor.

Behaviour keys on these declared facts, never on a model's name. `ModelSpec.tensors()` is the complete set
that a checkpoint must fill and that an exporter writes. Linear weights are [out, in].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Shape: TypeAlias = tuple[int, ...]
Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu"]
Norm = Literal["layer", "rms"]


@dataclass(frozen=True, slots=True)
class VisionSpec:
    """A vision transformer over square pictures of one size; pre-norm blocks, biases everywhere."""

    layers: int
    width: int
    heads: int
    mlp_width: int
    image_size: int
    patch_size: int
    activation: Activation
    norm_eps: float
    post_norm: bool
    channels: int = 3

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Feature rows of one crop."""
        return self.grid**2

    def tensors(self) -> dict[str, Shape]:
        """Canonical names and shapes."""
        w, m, p = self.width, self.mlp_width, self.patch_size
        out: dict[str, Shape] = {
            "vision.patch.weight": (w, self.channels, p, p),
            "vision.patch.bias": (w,),
            "vision.position": (self.tokens, w),
        }
        for i in range(self.layers):
            at = f"vision.layers.{i}"
            out |= _norm(f"{at}.norm1", w) | _norm(f"{at}.norm2", w)
            for part in ("q", "k", "v", "out"):
                out |= _linear(f"{at}.attn.{part}", w, w)
            out |= _linear(f"{at}.mlp.up", m, w) | _linear(f"{at}.mlp.down", w, m)
        return out | (_norm("vision.post_norm", w) if self.post_norm else {})


@dataclass(frozen=True, slots=True)
class MlpProjector:
    """Two linear layers. `joins_global`: its input is [global crop | stitched and pooled local crops]."""

    hidden: int
    activation: Activation
    joins_global: bool

    def tensors(self, vision: VisionSpec, out_width: int) -> dict[str, Shape]:
        """Canonical names and shapes."""
        source = vision.width * (2 if self.joins_global else 1)
        return _linear("projector.up", self.hidden, source) | _linear("projector.down", out_width, self.hidden)

    def image_tokens(self, vision: VisionSpec) -> int:
        """Decoder positions that one picture takes."""
        return vision.tokens


ProjectorSpec: TypeAlias = MlpProjector


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A causal transformer. `rope_dims`: the first dimensions of a head are rotated, pairs (i, i + rope_dims/2).

    `bidirectional_prefix`: all positions up to the end of the picture see each other.
    `parallel_residual`: one norm feeds attention and MLP, both are added to the same residual.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocab: int
    context: int
    norm: Norm
    norm_eps: float
    activation: Activation
    gated: bool
    parallel_residual: bool
    rope_dims: int
    rope_theta: float
    bias: bool
    head_bias: bool
    tied_head: bool
    bidirectional_prefix: bool

    def tensors(self) -> dict[str, Shape]:
        """Canonical names and shapes."""
        w, m, layer_norm = self.width, self.mlp_width, self.norm == "layer"
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        out: dict[str, Shape] = {"decoder.embed.weight": (self.vocab, w)}
        for i in range(self.layers):
            at = f"decoder.layers.{i}"
            out |= _norm(f"{at}.norm1", w, layer_norm)
            if not self.parallel_residual:
                out |= _norm(f"{at}.norm2", w, layer_norm)
            for part, rows, columns in (("q", q, w), ("k", kv, w), ("v", kv, w), ("out", w, q)):
                out |= _linear(f"{at}.attn.{part}", rows, columns, self.bias)
            if self.gated:
                out |= _linear(f"{at}.mlp.gate", m, w, self.bias)
            out |= _linear(f"{at}.mlp.up", m, w, self.bias) | _linear(f"{at}.mlp.down", w, m, self.bias)
        out |= _norm("decoder.norm", w, layer_norm)
        if not self.tied_head:
            out |= _linear("decoder.head", self.vocab, w, self.head_bias)
        return out


@dataclass(frozen=True, slots=True)
class RegionSpec:
    """Heads that read coordinates and sizes from the decoder's hidden state and feed them back as embeddings.

    A coordinate is one of `coord_bins` steps of 0..1; a size is one of `size_bins` steps, on a logarithmic
    scale (2^-10..1) or a linear one. Encoders take Fourier features: `coord_features` and `size_features`
    are the widths after cos and sin are joined.
    """

    coord_features: int
    coord_bins: int
    size_features: int
    size_bins: int
    hidden: int
    activation: Activation
    size_scale: Literal["log2", "linear"]

    def tensors(self, width: int) -> dict[str, Shape]:
        """Canonical names and shapes."""
        return (
            {"region.coord_features": (1, self.coord_features // 2)}
            | {"region.size_features": (2, self.size_features // 2)}
            | _linear("region.coord_encoder", width, self.coord_features)
            | _linear("region.coord_decoder.up", self.hidden, width)
            | _linear("region.coord_decoder.down", self.coord_bins, self.hidden)
            | _linear("region.size_encoder", width, self.size_features)
            | _linear("region.size_decoder.up", self.hidden, width)
            | _linear("region.size_decoder.down", 2 * self.size_bins, self.hidden)
        )


@dataclass(frozen=True, slots=True)
class OverlapCrops:
    """One global crop, then a grid of overlapping local crops; `margin` is the overlap of a side in patches."""

    max_crops: int
    margin: int


Tiling: TypeAlias = OverlapCrops


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """From any picture to crops of `size` x `size`; pixel / 255, minus mean, over std."""

    size: int
    patch_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: Literal["lanczos", "bicubic"]
    tiling: Tiling


@dataclass(frozen=True, slots=True)
class Ids:
    """Literal token ids in a template."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Text:
    """Text in a template, tokenized on its own; `{question}` and `{object}` are filled in."""

    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """Where the picture goes; left out (with nothing in its place) when there is none."""


@dataclass(frozen=True, slots=True)
class References:
    """Where spatial references go: a point is two coordinate slots, a box two and a size slot."""


@dataclass(frozen=True, slots=True)
class Coordinate:
    """A slot for the encoding of one given coordinate (`axis` x or y)."""

    axis: Literal["x", "y"]


Part: TypeAlias = Ids | Text | Image | References | Coordinate
Template: TypeAlias = tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class ReasoningSpec:
    """Grounded reasoning before the answer: its own stop and bans, then `answer` is fed and the answer follows."""

    stop: int
    banned: tuple[int, ...]
    coordinate: int
    chunk_starts: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PromptSpec:
    """Templates by name (`caption/short`, `query`, `query/reasoning`, `detect`, `point`, `gaze`) and stop rules.

    `banned` tokens are never chosen after the first token of an answer. `coordinate` is the token
    that stands for a coordinate; None where the release has no spatial references.
    """

    templates: dict[str, Template]
    stop: tuple[int, ...]
    banned: tuple[int, ...]
    max_tokens: int
    top_p: float
    max_objects: int = 0
    coordinate: int | None = None
    reasoning: ReasoningSpec | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model: its family's name, its blocks, how pictures and prompts become their inputs."""

    family: str
    vision: VisionSpec
    projector: ProjectorSpec
    decoder: DecoderSpec
    region: RegionSpec | None
    image: ImageSpec
    prompt: PromptSpec

    def tensors(self) -> dict[str, Shape]:
        """Every tensor of the model: canonical name -> shape."""
        width = self.decoder.width
        return (
            self.vision.tensors()
            | self.projector.tensors(self.vision, width)
            | self.decoder.tensors()
            | (self.region.tensors(width) if self.region else {})
        )

    @property
    def image_tokens(self) -> int:
        """Decoder positions that one picture takes."""
        return self.projector.image_tokens(self.vision)


COMPONENTS = ("vision", "projector", "decoder", "region")


def component(name: str) -> str:
    """Return the component ("vision", "projector", "decoder", "region") that a canonical name belongs to."""
    return name.partition(".")[0]


def _linear(name: str, rows: int, columns: int, bias: bool = True) -> dict[str, Shape]:
    weight: dict[str, Shape] = {f"{name}.weight": (rows, columns)}
    return weight | ({f"{name}.bias": (rows,)} if bias else {})


def _norm(name: str, width: int, bias: bool = True) -> dict[str, Shape]:
    weight: dict[str, Shape] = {f"{name}.weight": (width,)}
    return weight | ({f"{name}.bias": (width,)} if bias else {})
