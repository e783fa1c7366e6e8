"""Faults in code that every runtime uses: how pictures are cut, stitched and normalised, how bins are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image as Pillow

from vlmedge import imaging, regions
from vlmedge.parity.faults.fault import Fault, Shared, Target
from vlmedge.session import F32, U8, Grid
from vlmedge.spec import ImageSpec, ModelSpec

_PIXELS = ("preprocess",)
_HALF = np.float32(0.5)


def _replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Shared:
    """A function replaced by one made of it."""

    def patched(_: ModelSpec) -> AbstractContextManager[object]:
        return patch.object(owner, name, make(getattr(owner, name)))

    return Shared(patched)


def _resize(change: Callable[[Callable[..., U8]], Callable[..., U8]]) -> Shared:
    return _replaced(imaging, "resize", change)


def _filter(instead: Pillow.Resampling) -> Shared:
    def patched(spec: ModelSpec) -> AbstractContextManager[object]:
        return patch.dict(imaging._FILTERS, {spec.image.resample: instead})

    return Shared(patched)


def _without_antialiasing(_: Callable[..., U8]) -> Callable[..., U8]:
    """The filter's kernel is not widened when a picture shrinks, as `F.interpolate(antialias=False)`."""

    def resize(picture: U8, height: int, width: int, resample: str) -> U8:
        image = Pillow.fromarray(picture)
        scale = (image.width / width, 0, 0, 0, image.height / height, 0)
        return np.asarray(image.transform((width, height), Pillow.Transform.AFFINE, scale, Pillow.Resampling.BICUBIC))

    return resize


def _height_first(resize: Callable[..., U8]) -> Callable[..., U8]:
    def turned(picture: U8, height: int, width: int, resample: str) -> U8:
        across = resize(np.ascontiguousarray(picture.transpose(1, 0, 2)), width, height, resample)
        return np.ascontiguousarray(across.transpose(1, 0, 2))

    return turned


def _letterboxed(resize: Callable[..., U8]) -> Callable[..., U8]:
    """Keep the picture's proportions, and fill up with black."""

    def boxed(picture: U8, height: int, width: int, resample: str) -> U8:
        scale = min(height / picture.shape[0], width / picture.shape[1])
        inner = resize(picture, *(max(1, round(n * scale)) for n in picture.shape[:2]), resample)
        out = np.zeros((height, width, 3), np.uint8)
        out[: inner.shape[0], : inner.shape[1]] = inner
        return out

    return boxed


def _spec(change: Callable[[ImageSpec], ImageSpec]) -> Shared:
    """`imaging.crop` for a picture contract that is a little different."""
    return _replaced(imaging, "crop", lambda crop: lambda picture, spec: crop(picture, change(spec)))


def _crops(change: Callable[[imaging.Crops], imaging.Crops]) -> Shared:
    return _replaced(imaging, "crop", lambda crop: lambda picture, spec: change(crop(picture, spec)))


def _margin(by: int) -> Callable[[ImageSpec], ImageSpec]:
    return lambda spec: replace(spec, tiling=replace(spec.tiling, margin=spec.tiling.margin + by))


def _by_columns(crops: imaging.Crops) -> imaging.Crops:
    order = np.arange(1, crops.count).reshape(crops.tiling).T.ravel()
    return replace(crops, pixels=crops.pixels[[0, *order]])


def _fewer(select: Callable[..., Grid]) -> Callable[..., Grid]:
    return lambda height, width, window, most: select(height, width, window, most - 1)


def _turned(select: Callable[..., Grid]) -> Callable[..., Grid]:
    """Rows for columns."""
    return lambda height, width, window, most: select(width, height, window, most)


def _without_margin(stitch: Callable[..., Any]) -> Callable[..., Any]:
    """Crops give their windows beginning at their first patch, not behind the margin."""

    def index(spec: ImageSpec, tiling: Grid) -> Any:
        right, side = stitch(spec, tiling), spec.size // spec.patch_size
        crop, row, column = right // side**2, right // side % side, right % side
        margin = spec.tiling.margin
        return crop * side**2 + np.maximum(row - margin, 0) * side + np.maximum(column - margin, 0)

    return index


def _disjoint(_: Callable[..., F32]) -> Callable[..., F32]:
    """Pooling windows that never overlap: they end where the next begins."""

    def matrix(source: int, target: int) -> F32:
        out = np.zeros((target, source), np.float32)
        for i in range(target):
            start, stop = i * source // target, max((i + 1) * source // target, i * source // target + 1)
            out[i, start:stop] = 1 / (stop - start)
        return out

    return matrix


def _normalise(change: Callable[[F32], F32]) -> Shared:
    return _replaced(imaging, "normalise", lambda right: lambda pixels, spec: change(right(pixels, spec)))


def _by_256(right: Callable[..., F32]) -> Callable[..., F32]:
    def normalise(pixels: U8, spec: ImageSpec) -> F32:
        mean, std = (np.array(v, np.float32)[None, :, None, None] for v in (spec.mean, spec.std))
        scaled: F32 = ((right(pixels, spec) * std + mean) * np.float32(255 / 256) - mean) / std
        return scaled

    return normalise


def _linear(_: Callable[..., float]) -> Callable[..., float]:
    """The other scale than the model's."""

    def size(index: int, spec: Any) -> float:
        if spec.size_scale == "log2":
            return float(index / spec.size_bins)
        return float(2.0 ** (index / (spec.size_bins - 1) * 10 - 10))

    return size


def _exact_gelu(block: str) -> Shared:
    """In the projector or the region heads of llama.cpp's runtime, which are ours."""

    def gelu(x: F32) -> F32:
        erf = np.vectorize(math.erf, otypes=[np.float32])(x / np.sqrt(np.float32(2)))
        return np.asarray(x * (1 + erf) / 2, np.float32)

    @contextmanager
    def patched(_: ModelSpec) -> Iterator[None]:
        from vlmedge.runtimes import llamacpp_heads

        kind = getattr(llamacpp_heads, block)
        right = kind.run

        def run(self: Any, *given: Any) -> F32:
            with patch.object(llamacpp_heads, "gelu_tanh", gelu):
                out: F32 = right(self, *given)
            return out

        with patch.object(kind, "run", run):
            yield

    return Shared(patched)


def _own_gelu(part: str) -> Callable[[Target], bool]:
    """Does llama.cpp's runtime compute this part's activation in code of ours?"""

    def applies(target: Target) -> bool:
        block = getattr(target.spec, part)
        return target.format == "gguf" and block is not None and block.activation == "gelu_tanh"

    return applies


def _resamples(*filters: str) -> Callable[[Target], bool]:
    return lambda target: target.spec.image.resample in filters


def _normalises_here(target: Target) -> bool:
    """GGUF's tower normalises in native code, by its metadata."""
    return target.format == "onnx"


def _region(target: Target) -> bool:
    return target.spec.region is not None


def _joins(target: Target) -> bool:
    return target.spec.projector.joins_global


def _global_dropped(crops: imaging.Crops) -> imaging.Crops:
    return replace(crops, pixels=crops.pixels[1:])


SHARED = (
    Fault("bicubic", "bicubic instead of the model's filter", _filter(Pillow.Resampling.BICUBIC), _PIXELS,
          _resamples("lanczos")),
    Fault("bilinear", "bilinear instead of the model's filter", _filter(Pillow.Resampling.BILINEAR), _PIXELS),
    Fault("no-antialiasing", "a filter that is not widened when a picture shrinks", _resize(_without_antialiasing),
          _PIXELS),
    Fault("height-pass-first", "resized by height before width", _resize(_height_first), _PIXELS),
    Fault("letterboxed", "proportions kept and filled up", _resize(_letterboxed), _PIXELS),
    Fault("crops-bgr", "crops in the order BGR",
          _crops(lambda c: replace(c, pixels=np.ascontiguousarray(c.pixels[..., ::-1]))), _PIXELS),
    Fault("crops-by-columns", "crops in column order", _crops(_by_columns), _PIXELS),
    Fault("global-crop-dropped", "the global crop dropped", _crops(_global_dropped), (*_PIXELS, "refused")),
    Fault("margin-less", "crops overlap by one patch less", _spec(_margin(-1)), _PIXELS),
    Fault("margin-more", "crops overlap by one patch more", _spec(_margin(1)), _PIXELS),
    Fault("crops-fewer", "one crop fewer than the model's when a tiling is chosen",
          _replaced(imaging, "select_tiling", _fewer), _PIXELS),
    Fault("tiling-exchanged", "rows and columns exchanged when a tiling is chosen",
          _replaced(imaging, "select_tiling", _turned), _PIXELS),
    Fault("stitched-from-corner", "stitched from a crop's corner instead of behind its margin",
          _replaced(imaging, "stitch_index", _without_margin), ("projected",), _joins),
    Fault("pooling-disjoint", "pooling windows that do not overlap", _replaced(imaging, "pool_matrix", _disjoint),
          ("projected",), _joins),
    Fault("pixels-256", "pixels over 256 instead of 255", _replaced(imaging, "normalise", _by_256), ("features",),
          _normalises_here),
    Fault("pixels-unsigned", "pixels in 0..1 instead of -1..1", _normalise(lambda x: x * _HALF + _HALF), ("features",),
          _normalises_here),
    Fault("projector-gelu-running", "exact GELU in the runtime's projector", _exact_gelu("Projector"), ("projected",),
          _own_gelu("projector")),
    Fault("region-gelu-running", "exact GELU in the runtime's region heads", _exact_gelu("RegionHeads"), ("regions",),
          _own_gelu("region")),
    Fault("bins-less-one", "coordinates over the number of bins less one",
          _replaced(regions, "coordinate_of", lambda _: lambda logits: int(np.argmax(logits)) / (len(logits) - 1)),
          ("boxes",), _region),
    Fault("sizes-other-scale", "sizes read on the other scale", _replaced(regions, "_size", _linear), ("boxes",),
          _region),
)  # fmt: skip
