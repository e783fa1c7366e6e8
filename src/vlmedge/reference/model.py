"""One whole model in PyTorch, built from its spec and filled from canonical tensors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from vlmedge.reference.blocks import Decoder, Region, Tower, projector, rope_table
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
    model = model.to_empty(device=device).to(dtype).eval().requires_grad_(False)
    model.decoder.rope = rope_table(spec.decoder).to(device)  # not a parameter, and float32 in every dtype
    fill(model, tensors)
    return model


def fill(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
    """Read canonical tensors into a module whose parameters are named `prefix` + their own name."""
    for name, parameter in module.named_parameters():
        target = parameter.data.view(parameter.shape[0], -1) if parameter.ndim > 1 else parameter.data.view(1, -1)
        at = 0
        for source in sources(prefix + name):
            for block in tensors[source].blocks():
                values = torch.from_numpy(block).to(parameter.dtype)
                if parameter.ndim > 1:
                    target[at : at + len(values)] = values
                    at += len(values)
                else:
                    target[0, at : at + values.numel()] = values[0]
                    at += values.numel()


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
