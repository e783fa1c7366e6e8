"""One whole model in PyTorch, built from its spec and filled from canonical tensors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from vlmedge.reference.blocks import Decoder, Region, Tower, projector
from vlmedge.session import F32
from vlmedge.spec import ModelSpec
from vlmedge.tensors import Tensor


class Reference(nn.Module):
    """Vision tower, projector, decoder and region heads of one ModelSpec."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.vision = Tower(spec.vision)
        self.projector = projector(spec.projector, spec.vision, spec.decoder.width)
        self.decoder = Decoder(spec.decoder)
        self.region = Region(spec.region, spec.decoder.width) if spec.region else None


def build(spec: ModelSpec, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> Reference:
    """Build the model and read every tensor into it, block by block, in `dtype`."""
    with torch.device("meta"):
        model = Reference(spec)
    rope = model.decoder.rope.shape
    model = model.to_empty(device=device).to(dtype).eval().requires_grad_(False)
    from vlmedge.reference.blocks import rope_table

    model.decoder.rope = rope_table(spec.decoder).to(device)
    assert model.decoder.rope.shape == rope
    for name, parameter in model.named_parameters():
        target = parameter.data.view(parameter.shape[0], -1) if parameter.ndim > 1 else parameter.data.view(1, -1)
        row = 0
        for source in sources(name):
            tensor = tensors[source]
            if parameter.ndim == 1:
                values = torch.from_numpy(tensor.read())
                target[0, row : row + values.numel()] = values.to(dtype)
                row += values.numel()
                continue
            for block in tensor.blocks():
                target[row : row + len(block)] = torch.from_numpy(block).to(dtype)
                row += len(block)
    return model


def sources(name: str) -> list[str]:
    """The canonical tensors behind a parameter: packed qkv is three."""
    return [name.replace(".qkv.", f".{part}.") for part in "qkv"] if ".qkv." in name else [name]


def canonical(model: Reference) -> dict[str, F32]:
    """The model's parameters as canonical float32 arrays."""
    shapes = model.spec.tensors()
    out: dict[str, F32] = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().float().cpu().numpy()
        names = sources(name)
        cuts = np.cumsum([shapes[n][0] for n in names])[:-1]
        out |= dict(zip(names, np.split(values, cuts), strict=True))
    return out
