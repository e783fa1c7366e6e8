"""Which tensor of which file each canonical tensor becomes: names, shapes, padding, the fold of the projector."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from vlmedge.exporters.gguf.ggml import F16, F32, GgmlType, fitting, wanted
from vlmedge.quant_profiles import Scheme
from vlmedge.spec import ModelSpec, Shape, component

TEXT, MMPROJ, HEADS = "text.gguf", "mmproj.gguf", "heads.gguf"
LOCAL = "projector.local.weight"
Take = Literal["all", "fold", "local"]

# llama.cpp: src/llama-arch.cpp (text), tools/mtmd/clip-impl.h (vision); {i} is the layer.
NAMES = {
    "decoder.embed": "token_embd",
    "decoder.layers.{i}.norm1": "blk.{i}.attn_norm",
    "decoder.layers.{i}.norm2": "blk.{i}.ffn_norm",
    "decoder.layers.{i}.attn.q": "blk.{i}.attn_q",
    "decoder.layers.{i}.attn.k": "blk.{i}.attn_k",
    "decoder.layers.{i}.attn.v": "blk.{i}.attn_v",
    "decoder.layers.{i}.attn.out": "blk.{i}.attn_output",
    "decoder.layers.{i}.mlp.gate": "blk.{i}.ffn_gate",
    "decoder.layers.{i}.mlp.up": "blk.{i}.ffn_up",
    "decoder.layers.{i}.mlp.down": "blk.{i}.ffn_down",
    "decoder.norm": "output_norm",
    "decoder.head": "output",
    "vision.patch": "v.patch_embd",
    "vision.position": "v.position_embd.weight",
    "vision.layers.{i}.norm1": "v.blk.{i}.ln1",
    "vision.layers.{i}.norm2": "v.blk.{i}.ln2",
    "vision.layers.{i}.attn.q": "v.blk.{i}.attn_q",
    "vision.layers.{i}.attn.k": "v.blk.{i}.attn_k",
    "vision.layers.{i}.attn.v": "v.blk.{i}.attn_v",
    "vision.layers.{i}.attn.out": "v.blk.{i}.attn_out",
    "vision.layers.{i}.mlp.up": "v.blk.{i}.ffn_up",
    "vision.layers.{i}.mlp.down": "v.blk.{i}.ffn_down",
    "vision.post_norm": "v.post_ln",
    "projector.up": "mm.0",
    "projector.down": "mm.2",
}


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of one file.

    `source`: the canonical tensor that it is made of. `take`: all of it, or of the joined projector's columns
    [global | local] their sum ("fold") or the second half ("local"). `shape` is padded with zeros at the end of
    either axis where the source is smaller. `parameters`: the source's weights that it stands for.
    """

    file: str
    tensor: str
    source: str
    take: Take
    shape: Shape
    kind: GgmlType
    parameters: int
    note: str = ""

    @property
    def rows(self) -> int:
        """Rows as `Tensor.rows` counts them."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def columns(self) -> int:
        """Elements of one row."""
        size = 1
        for n in self.shape[1:] if len(self.shape) > 1 else self.shape:
            size *= n
        return size

    @property
    def bytes(self) -> int:
        """Bytes of its data."""
        return self.kind.size((self.rows, self.columns))


def layout(spec: ModelSpec, plan: Mapping[str, Scheme], max_part: int) -> tuple[Stored, ...]:
    """Return every tensor of every file, in the order of `spec.tensors()`.

    Tensors of text.gguf that exceed `max_part` bytes together go to text-00001-of-0000N.gguf and so on, which
    llama.cpp opens by the first; mtmd opens single files only, so mmproj.gguf is never cut.
    """
    padded = mlp_width(spec, plan)
    stored = [s for name, shape in spec.tensors().items() for s in _store(spec, name, shape, plan[name], padded)]
    parts: list[int] = []
    for s in stored:
        if s.file == TEXT:
            if not parts or parts[-1] + s.bytes > max_part:
                parts.append(0)
            parts[-1] += s.bytes
    return tuple(stored) if len(parts) < 2 else tuple(_numbered(stored, max_part, len(parts)))


def _numbered(stored: list[Stored], max_part: int, parts: int) -> Iterator[Stored]:
    number, size = 1, 0
    for s in stored:
        if s.file != TEXT:
            yield s
            continue
        if size and size + s.bytes > max_part:
            number, size = number + 1, 0
        size += s.bytes
        yield replace(s, file=part_name(number, parts))


def role_of(file: str) -> str:
    """What a file is for: "text", "mmproj" or "heads"."""
    return file.removesuffix(".gguf").partition("-")[0]


def part_name(number: int, parts: int) -> str:
    """The name of one part of text.gguf, counted from 1, as llama.cpp's `llama_split_path` writes it."""
    return f"{TEXT.removesuffix('.gguf')}-{number:05d}-of-{parts:05d}.gguf"


def mlp_width(spec: ModelSpec, plan: Mapping[str, Scheme]) -> int:
    """The vision MLP's width in the file: a multiple of its types' blocks.

    Zero rows of `up` (and of its bias) give GELU(0) = 0, which meets zero columns of `down`: the same numbers.
    A width equal to the tower's is avoided: clip.cpp would take `down` for `up` and swap them.
    """
    vision = spec.vision
    kinds = [wanted(plan[f"vision.layers.{i}.mlp.down.weight"]) for i in range(vision.layers)]
    block = max((kind.block for kind in kinds), default=1)
    if block > 32 and _up(vision.mlp_width, block) * 16 > vision.mlp_width * 17:
        block = 32  # too much padding for a small tower: the type falls back instead
    width = _up(vision.mlp_width, block)
    return width if width != vision.width else width + max(block, 32)


def piece(stored: Stored) -> str:
    """The key of a stored tensor in `Exporter.encodings`: its source, and `#local` for the second piece of one."""
    return stored.source + ("#local" if stored.take == "local" else "")


def _store(spec: ModelSpec, name: str, shape: Shape, scheme: Scheme, padded: int) -> Iterator[Stored]:
    part, size = component(name), _size(shape)
    file = {"decoder": TEXT, "region": HEADS}.get(part, MMPROJ)
    if name == "projector.up.weight" and spec.projector.joins_global:
        half = (shape[0], shape[1] // 2)
        for where, target, take in ((MMPROJ, "mm.0.weight", "fold"), (HEADS, LOCAL, "local")):
            kind, note = fitting(wanted(scheme), half[1])
            yield Stored(where, target, name, "fold" if take == "fold" else "local", half, kind, size // 2, note)
        return
    tensor = _rename(name)
    if name == "vision.patch.weight":
        kind = F32 if wanted(scheme) is F32 else F16
        note = "" if kind is wanted(scheme) else f"a convolution's kernel has no {wanted(scheme).name} form"
        yield Stored(file, tensor, name, "all", shape, kind, size, note)
        return
    stored = _padded(name, shape, spec.vision.mlp_width, padded)
    kind, note = fitting(wanted(scheme), stored[-1])
    if stored != shape:
        note = "; ".join(filter(None, (f"zero-padded from {spec.vision.mlp_width} to {padded}", note)))
    yield Stored(file, tensor, name, "all", stored, kind, size, note)


def _rename(name: str) -> str:
    stem, dot, leaf = name.rpartition(".")
    if name in NAMES:
        return NAMES[name]
    layer = re.search(r"\.(\d+)\.", name)
    number = layer[1] if layer else ""
    pattern = stem.replace(f".{number}.", ".{i}.") if layer else stem
    return NAMES[pattern].replace("{i}", number) + dot + leaf if pattern in NAMES else name


def _padded(name: str, shape: Shape, width: int, padded: int) -> Shape:
    if re.fullmatch(r"vision\.layers\.\d+\.mlp\.up\.(weight|bias)", name):
        return (padded, *shape[1:])
    if re.fullmatch(r"vision\.layers\.\d+\.mlp\.down\.weight", name):
        return (shape[0], padded)
    return shape


def _up(n: int, block: int) -> int:
    return -(-n // block) * block


def _size(shape: Shape) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
