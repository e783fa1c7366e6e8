"""The preprocessing contract of a bundle: what an app in another language needs to make the same bytes."""

from __future__ import annotations

from typing import Any

from vlmedge.spec import ImageSpec, ModelSpec

_SUPPORT = {"lanczos": 3.0, "bicubic": 2.0}
_KERNEL = {
    "lanczos": "sinc(x) * sinc(x / 3) for -3 <= x < 3, else 0; sinc(x) = sin(pi * x) / (pi * x), sinc(0) = 1",
    "bicubic": "with a = -0.5 and x = |x|: ((a + 2) * x - (a + 3)) * x * x + 1 for x < 1, "
    "(((x - 5) * x + 8) * x - 4) * a for x < 2, else 0",
}


def image_contract(spec: ImageSpec) -> dict[str, Any]:
    """Every step from a decoded file to the tower's input, as facts and one sentence each."""
    margin = spec.patch_size * spec.tiling.margin
    window = spec.size - 2 * margin
    return {
        "decode": {
            "exif": "ignored: pixels in stored order, as the original reads them",
            "icc": "ignored: stored values are used as they are",
            "alpha": "dropped, not blended",
            "animation": "first frame",
            "grey": "repeated into three channels",
            "sixteen_bit": "the upper 8 bits",
            "colour": "RGB, 8 bits per channel",
        },
        "resize": {
            "filter": spec.resample,
            "support": _SUPPORT[spec.resample],
            "kernel": _KERNEL[spec.resample],
            "order": ["width", "height"],
            "passes": "one per axis, each from 8 bits to 8 bits; an axis that keeps its length is skipped",
            "window": "output i of an axis of n inputs and m outputs: scale = n / m, stretch = max(scale, 1), "
            "c = (i + 0.5) * scale, inputs from max(int(c - support * stretch + 0.5), 0) up to and without "
            "min(int(c + support * stretch + 0.5), n), int truncating towards zero",
            "weights": "input j: kernel((j - c + 0.5) * (1 / stretch)) in float64, divided by the window's sum, times "
            "2^22, 0.5 added (subtracted where negative) and truncated towards zero to int32",
            "sum": "2^21 + the int32 sum of weight * value, shifted right by 22 (rounding down), clamped to 0..255",
        },
        "tiling": {
            "kind": "overlap_crops",
            "size": spec.size,
            "patch_size": spec.patch_size,
            "max_crops": spec.tiling.max_crops,
            "margin_patches": spec.tiling.margin,
            "margin": margin,
            "window": window,
            "rule": f"h, w = height - {2 * margin}, width - {2 * margin}; m = {spec.tiling.max_crops}; "
            f"(1, 1) if h <= {window} or w <= {window}; "
            f"a, b = ceil(h / {window}), ceil(w / {window}); if a * b > m: r = sqrt(m / (a * b)), "
            "(max(1, floor(a * r)), max(1, floor(b * r))); else rows = max(floor(sqrt(m * h / w)), a), "
            "columns = max(floor(sqrt(m * w / h)), b); if rows * columns > m the larger one becomes "
            "floor(m / the smaller), rows where they are equal",
            "canvas": f"the picture resized to (rows * {window} + {2 * margin}) x (columns * {window} + {2 * margin})",
            "crops": f"crop 0: the picture resized to {spec.size} x {spec.size}; then, row by row, {spec.size} x "
            f"{spec.size} of the canvas at (row * {window}, column * {window}); for (1, 1) both are the same",
        },
        "stitching": {
            "grid": f"rows * {window // spec.patch_size} + {2 * spec.tiling.margin} by columns likewise, in patches",
            "place": f"the first patch of local crop (row, column) lies at (row * {window // spec.patch_size}, "
            f"column * {window // spec.patch_size}) of the grid",
            "rule": f"a local crop fills its inner {window // spec.patch_size} x {window // spec.patch_size} patches, "
            "and its margin too on the picture's border",
            "pooling": f"adaptive average to {spec.size // spec.patch_size} cells a side (g): window i of n "
            "cells is [floor(i * n / g), ceil((i + 1) * n / g))",
            "join": "per patch: [features of crop 0 | pooled features of the local crops]",
        },
        "normalise": {"divide": 255.0, "mean": list(spec.mean), "std": list(spec.std), "layout": "n, 3, height, width"},
    }


def prompt_contract(spec: ModelSpec) -> dict[str, Any]:
    """What stands around the templates: bans, stops, loops."""
    prompt = spec.prompt
    out: dict[str, Any] = {
        "text": "every text part is tokenized on its own and the ids are joined",
        "image_tokens": spec.image_tokens,
        "attention": "all positions up to the end of the picture see each other, everything after is causal; "
        "without a picture everything is causal"
        if spec.decoder.bidirectional_prefix
        else "causal",
        "stop": list(prompt.stop),
        "banned_after_first": list(prompt.banned),
    }
    if spec.region is not None:
        bins = spec.region.size_bins
        scale = f"2 ^ (bin / {bins - 1} * 10 - 10)" if spec.region.size_scale == "log2" else f"bin / {bins}"
        out["regions"] = {
            "hidden": "the decoder's last hidden state before the final norm",
            "coordinate": f"argmax of coord_decoder / {spec.region.coord_bins}",
            "size": f"argmax of size_decoder's two halves (width, height); value = {scale}",
            "loop": "until the logits choose a stop token: x from the hidden state, feed coord_encoder(x); y, feed "
            "coord_encoder(y); for boxes width and height, feed size_encoder; the next logits decide again",
            "encoders": "linear([cos f | sin f]), f = 2 pi values @ features",
            "box": "centre (x, y) plus and minus half of the size, not clipped",
            "max_objects": prompt.max_objects,
        }
    return out
