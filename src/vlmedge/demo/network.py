"""The trainer's view of the reference model: batched forward pass with a block mask, and the losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmedge import imaging
from vlmedge.demo.batch import COORDINATE, NONE, PADDING, SIZE, Batch
from vlmedge.demo.scene import COLORS, KINDS
from vlmedge.reference.blocks import Region
from vlmedge.reference.model import Reference
from vlmedge.session import Grid
from vlmedge.spec import ImageSpec

_SPREAD = 4.0  # soft targets: the Gaussian's width in bins


@dataclass(frozen=True, slots=True)
class Losses:
    """Mean losses of one batch, and which token targets were met.

    `right` bool [targets]; `owners` int64 [targets] tells the question: picture * 64 + branch.
    """

    language: Tensor
    coordinate: Tensor
    size: Tensor
    dense: Tensor
    right: Tensor
    owners: Tensor

    def total(self, late: bool, dense_weight: float) -> Tensor:
        """The weighted sum; coordinates and sizes count double `late` in the schedule."""
        region = 0.15 * self.coordinate + 0.1 * self.size
        return self.language + (2 if late else 1) * region + dense_weight * self.dense


class Dense(nn.Linear):
    """A linear layer on every projected image token, beside the language loss and thrown away after training."""

    def __init__(self, width: int) -> None:
        self.splits = [1 + len(KINDS), 1 + len(COLORS), 4]
        super().__init__(width, sum(self.splits))

    def loss(self, image: Tensor, kinds: Tensor, colors: Tensor, geometry: Tensor) -> Tensor:
        """Cross entropy of kind and colour plus the error of centre and size where there is a thing."""
        kind, color, place = self(image).float().split(self.splits, dim=-1)
        there = kinds > 0
        error = F.smooth_l1_loss(place[there], geometry[there])
        return (
            F.cross_entropy(kind.flatten(0, 1), kinds.flatten())
            + F.cross_entropy(color.flatten(0, 1), colors.flatten())
            + error
        )


def initialise(model: Reference) -> None:
    """Fill fresh parameters: variance-preserving matrices, smaller where a branch joins the residual stream."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.7 * module.in_features**-0.5)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)
    for stack in (model.vision.layers, model.decoder.layers):
        for name, weight in stack.named_parameters():
            if name.endswith(("attn.out.weight", "mlp.down.weight")):
                weight.data.mul_((2 * len(stack)) ** -0.5)
    nn.init.normal_(model.vision.position, std=0.3)
    if model.region is not None:
        nn.init.normal_(model.region.coord_features, std=2.5)
        nn.init.normal_(model.region.size_features, std=2.5)


def image_tokens(model: Reference, batch: Batch) -> Tensor:
    """The pictures' rows for the decoder [B, tokens, width]; a picture of one crop uses its features twice."""
    spec = model.spec.image
    pixels = torch.from_numpy(batch.crops).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
    features = model.vision(pixels)
    whole, at = features[: len(batch.ids)], len(batch.ids)
    local = list(whole)
    for picture, grid in batch.tiled:
        count = grid[0] * grid[1]
        local[picture] = pooled(features[at : at + count], spec, grid)
        at += count
    return cast(Tensor, model.projector(torch.cat([whole, torch.stack(local)], dim=-1)))


def pooled(local: Tensor, spec: ImageSpec, grid: Grid) -> Tensor:
    """Stitch and pool the local crops' features [n, tokens, width] to [tokens, width]."""
    side = spec.size // spec.patch_size
    cells = local.reshape(-1, local.shape[-1])[torch.from_numpy(imaging.stitch_index(spec, grid))]
    down, across = (torch.from_numpy(imaging.pool_matrix(n, side)).to(cells.dtype) for n in cells.shape[:2])
    return torch.einsum("ih,hwc,jw->ijc", down, cells, across).reshape(side * side, -1)


def losses(model: Reference, dense: Dense, batch: Batch) -> Losses:
    """Run the batch through the model; see `Losses`."""
    region = cast(Region, model.region)
    image = image_tokens(model, batch)
    hidden = model.decoder(
        inputs(model, batch, image), mask=block_mask(batch), positions=torch.from_numpy(batch.positions)
    )
    tokens, coordinates, sizes = (
        torch.from_numpy(a) for a in (batch.next_token, batch.next_coordinate, batch.next_size)
    )
    told, placed, sized = tokens != NONE, ~coordinates.isnan(), ~sizes[..., 0].isnan()
    logits = model.decoder.logits(hidden[told]).float()
    size = region.size_decoder(hidden[sized]).float().unflatten(-1, (2, -1))
    bins = (sizes[sized].clamp(2**-10, 1).log2() + 10) / 10 * (size.shape[-1] - 1)
    coordinate = region.coord_decoder(hidden[placed]).float()
    owners = torch.arange(len(tokens))[:, None] * 64 + torch.from_numpy(batch.branch)
    return Losses(
        F.cross_entropy(logits, tokens[told]),
        soft_loss(coordinate, coordinates[placed] * coordinate.shape[-1]),
        soft_loss(size, bins),
        dense.loss(image, *(torch.from_numpy(a) for a in (batch.kinds, batch.colors, batch.geometry))),
        logits.detach().argmax(-1) == tokens[told],
        owners[told],
    )


def inputs(model: Reference, batch: Batch, image: Tensor) -> Tensor:
    """Decoder inputs [B, T, width]: embeddings, image tokens, and encodings of coordinates and sizes in float32."""
    region = cast(Region, model.region)
    x = model.decoder.embed(torch.from_numpy(batch.ids))
    x[:, 1 : 1 + image.shape[1]] = image.to(x.dtype)
    modes, values = torch.from_numpy(batch.modes), torch.from_numpy(batch.values)
    with torch.autocast("cpu", enabled=False):
        x[modes == COORDINATE] = region.encode_coordinate(values[modes == COORDINATE][:, :1])
        x[modes == SIZE] = region.encode_size(values[modes == SIZE])
    return cast(Tensor, x)


def block_mask(batch: Batch) -> Tensor:
    """Bool [B, 1, T, T]: the prefix sees itself, a question sees the prefix and itself up to here."""
    branch, position = torch.from_numpy(batch.branch), torch.from_numpy(batch.positions)
    own = (branch[:, :, None] == branch[:, None, :]) & (position[:, None, :] <= position[:, :, None])
    return ((branch == 0)[:, None, :] | (own & (branch != PADDING)[:, None, :]))[:, None]


def soft_loss(logits: Tensor, bins: Tensor) -> Tensor:
    """Cross entropy [..., n] against a Gaussian around a fractional bin [...]."""
    steps = torch.arange(logits.shape[-1], dtype=torch.float32)
    target = (-0.5 * ((steps - bins[..., None]) / _SPREAD) ** 2).softmax(-1)
    return F.cross_entropy(logits.flatten(0, -2), target.flatten(0, -2))
