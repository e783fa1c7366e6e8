"""A vision tower in libmtmd: crops of the tower's own size in, its rows before the projector out."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np

from vlmedge.errors import BundleError, RuntimeFailedError
from vlmedge.runtimes.llamacpp_native import Native
from vlmedge.runtimes.llamacpp_tap import TowerTap
from vlmedge.runtimes.llamacpp_units import Device
from vlmedge.session import F32, U8
from vlmedge.spec import VisionSpec

_IMAGE = 1  # mtmd_input_chunk_type


class VisionTower:
    """mtmd with a tap; one stock `mmproj.gguf` serves stock apps and this."""

    def __init__(
        self, native: Native, path: Path, model: Any, spec: VisionSpec, threads: int, device: Device | None = None
    ) -> None:
        """Load the tower of `path` for the text model `model`; raises BundleError where mtmd refuses the file.

        `device`: None for the CPU. mtmd fails where it cannot start the device, and takes no other.
        """
        self._native, self._spec = native, spec
        self._tap = TowerTap(native)
        params = native.fill(
            native.mtmd.mtmd_context_params_default(),
            use_gpu=device is not None,
            device=device.handle if device else None,
            print_timings=False,
            n_threads=threads,
            warmup=False,  # a whole crop, for nothing: buffers are reserved at the first picture
            cb_eval=self._tap.callback,
        )
        self._context = native.mtmd.mtmd_init_from_file(os.fsencode(path), model, params)
        if not self._context:
            raise BundleError(str(native.log.failure(f"{path} does not load")))
        self._marker = native.mtmd.mtmd_default_marker()

    def encode(self, pixels: U8) -> F32:
        """uint8 [n, size, size, 3] -> float32 [n, tokens, width]."""
        spec = self._spec
        if pixels.shape[1:] != (spec.image_size, spec.image_size, 3):
            raise ValueError(f"crops are {spec.image_size}x{spec.image_size} RGB, not {pixels.shape[1:]}")
        out = np.empty((len(pixels), spec.tokens, spec.width), np.float32)
        for row, crop in zip(out, np.ascontiguousarray(pixels, np.uint8), strict=True):
            row[:] = self._encode_one(crop)
        return out

    def close(self) -> None:
        """Free the tower."""
        context, self._context = self._context, None
        if context:
            self._native.mtmd.mtmd_free(context)

    def _encode_one(self, crop: U8) -> F32:
        mtmd = self._native.mtmd
        chunks = mtmd.mtmd_input_chunks_init()
        try:
            # A bitmap of exactly the tower's size is copied and normalised, not resized.
            status = mtmd.mtmd_encode_chunk(self._context, self._chunk(chunks, crop))
        finally:
            mtmd.mtmd_input_chunks_free(chunks)
        if status:
            raise self._native.log.failure("the vision tower failed")
        rows = self._tap.take("vision tower's rows")
        if rows.shape != (self._spec.tokens, self._spec.width):
            raise RuntimeFailedError(
                f"the vision tower gave {rows.shape} rows, not {(self._spec.tokens, self._spec.width)}"
            )
        return rows

    def _chunk(self, chunks: Any, crop: U8) -> Any:
        mtmd = self._native.mtmd
        bitmap = mtmd.mtmd_bitmap_init(
            crop.shape[1], crop.shape[0], crop.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        )
        text = mtmd.mtmd_input_text(self._marker, len(self._marker), False, True)
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        try:
            status = mtmd.mtmd_tokenize(self._context, chunks, ctypes.byref(text), bitmaps, 1)
        finally:
            mtmd.mtmd_bitmap_free(bitmap)
        if status == 0 and mtmd.mtmd_input_chunks_size(chunks) == 1:
            chunk = mtmd.mtmd_input_chunks_get(chunks, 0)
            if mtmd.mtmd_input_chunk_get_type(chunk) == _IMAGE:
                return chunk
        raise self._native.log.failure("mtmd did not take a crop")
