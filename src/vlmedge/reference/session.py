"""The original as a session: fused attention, a preallocated KV cache, crops in one batch; fp32 or bf16.

Every step copies its result to the CPU's memory, which waits for a GPU: whoever times a step times all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from vlmedge import imaging
from vlmedge.errors import ContextError, RuntimeFailedError
from vlmedge.reference.blocks import LayerCache, Region
from vlmedge.reference.model import build
from vlmedge.reference.precision import computing
from vlmedge.reference.threads import torch_threads
from vlmedge.session import F32, I32, U8, Grid, Step
from vlmedge.spec import ModelSpec
from vlmedge.tensors import Tensor

_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
_CROPS_AT_ONCE = 16  # bounds memory for extremely elongated pictures


class TorchSession:
    """A `Session` over the reference modules."""

    runtime = "torch"

    def __init__(
        self,
        spec: ModelSpec,
        tensors: Mapping[str, Tensor],
        *,
        dtype: str = "f32",
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        """Read the weights in `dtype` ("f32", "bf16" or "f16") onto `device`. `threads`: None for PyTorch's own.

        `device`: "cpu", "cuda" (where float32 is never rounded to TF32) or "mps". Raises RuntimeFailedError where the
        device's memory is too small.
        """
        self.threads, self.device = threads, torch.device(device)
        self._spec, self._dtype = spec, _DTYPES[dtype]
        with torch_threads(threads), _in_memory_of(self.device):
            self._model = build(spec, tensors, self._dtype, self.device)
            self._caches = [LayerCache(spec.decoder, self._dtype, self.device) for _ in range(spec.decoder.layers)]

    @property
    def position(self) -> int:
        """Positions in the KV cache."""
        return self._caches[0].length

    @property
    def context(self) -> int:
        """Positions that the KV cache can hold."""
        return self._spec.decoder.context

    @computing
    def vision(self, pixels: U8) -> F32:
        """uint8 [n, size, size, 3] -> float32 [n, tokens, width]; normalised in the model's dtype, as upstream does."""
        image = self._spec.image
        mean, std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (image.mean, image.std))
        out = []
        for start in range(0, len(pixels), _CROPS_AT_ONCE):
            part = torch.from_numpy(np.ascontiguousarray(pixels[start : start + _CROPS_AT_ONCE]))
            x = part.permute(0, 3, 1, 2).to(self.device, self._dtype).contiguous()
            x = x.div_(255.0).sub_(mean.to(self._dtype)).div_(std.to(self._dtype))
            out.append(self._model.vision(x).float().cpu())
        return _array(torch.cat(out))

    @computing
    def project(self, features: F32, tiling: Grid) -> F32:
        """float32 [crops, tokens, width] -> float32 [image_tokens, decoder width]."""
        x = self._tensor(features)
        if self._spec.projector.joins_global:
            x = torch.cat([x[0], self._pooled(x[1:], tiling)], dim=-1)
        return _array(self._model.projector(x))

    def _pooled(self, local: torch.Tensor, tiling: Grid) -> torch.Tensor:
        image = self._spec.image
        side = image.size // image.patch_size
        index = torch.from_numpy(imaging.stitch_index(image, tiling)).to(self.device)
        grid = local.reshape(-1, local.shape[-1])[index]
        down, across = (self._tensor(imaging.pool_matrix(n, side)) for n in grid.shape[:2])
        return torch.einsum("ih,hwc,jw->ijc", down, grid, across).reshape(side * side, -1)

    @computing
    def embed(self, ids: I32) -> F32:
        """int32 [n] -> float32 [n, width]."""
        return _array(self._model.decoder.embed(torch.from_numpy(np.asarray(ids, np.int64)).to(self.device)))

    @computing
    def forward(
        self, inputs: F32 | I32, *, bidirectional: bool = False, hidden: bool = False, every: bool = False
    ) -> Step:
        """Append positions to the KV cache; see `Session.forward`."""
        start, n = self.position, len(inputs)
        if start + n > self.context:
            raise ContextError(f"{start + n} positions do not fit the model's context of {self.context}")
        decoder = self._model.decoder
        if np.issubdtype(inputs.dtype, np.integer):
            x = decoder.embed(torch.from_numpy(inputs.astype(np.int64)).to(self.device))
        else:
            x = self._tensor(np.asarray(inputs, np.float32))
        mask = None
        if not bidirectional and n > 1 and start > 0:
            mask = torch.ones(n, start + n, dtype=torch.bool, device=self.device).tril_(start)
        out = decoder(x[None], start, self._caches, mask, causal=not bidirectional and n > 1 and start == 0)[0]
        logits = decoder.logits(out if every else out[-1])
        return Step(_array(logits), _array(out[-1]) if hidden else None)

    @computing
    def head(self, name: str, inputs: F32) -> F32:
        """Run a region head on one vector."""
        region = self._model.region
        assert region is not None
        return _array(run_head(region, name, self._tensor(np.atleast_1d(inputs))))

    def rewind(self, position: int) -> None:
        """Forget every position from `position` on."""
        for cache in self._caches:
            cache.length = min(cache.length, position)

    def info(self) -> dict[str, Any]:
        """Versions, dtype, threads, and the unit that computes: all of the model, on PyTorch's current device of it."""
        return {
            "torch": torch.__version__,
            "dtype": str(self._dtype).removeprefix("torch."),
            "unit": self.device.type,
            "device": self._device_name(),
            "threads": self.threads or torch.get_num_threads(),
        }

    def close(self) -> None:
        """Free the weights and the cache; a GPU's memory goes back to its driver."""
        self._model = self._caches = None  # type: ignore[assignment]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.device.type == "mps":
            torch.mps.empty_cache()

    def _device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return {"mps": "Apple GPU"}.get(self.device.type, str(self.device))

    def _tensor(self, array: F32) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(self.device, self._dtype)


@contextmanager
def _in_memory_of(device: torch.device) -> Iterator[None]:
    """Raise RuntimeFailedError, one line, where a GPU's memory is too small for the weights and the KV cache."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        line = str(error).split(". ", 1)[0]
        raise RuntimeFailedError(
            f"the original does not fit the memory of the {device.type} device ({line}): take dtype bf16, a shorter "
            "context, or the CPU"
        ) from error


def run_head(region: Region, name: str, x: torch.Tensor) -> torch.Tensor:
    """Run the region head that `Session.head` calls `name` on one vector."""
    run: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "coord_encoder": region.encode_coordinate,
        "size_encoder": region.encode_size,
        "coord_decoder": region.coord_decoder,
        "size_decoder": region.size_decoder,
    }
    return run[name](x)


def _array(tensor: torch.Tensor) -> F32:
    result: F32 = tensor.float().cpu().numpy()
    return result
