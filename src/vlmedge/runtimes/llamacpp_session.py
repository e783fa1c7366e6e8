"""A GGUF bundle as a session: libmtmd's tower, ggml's products, libllama's decoder, with full fidelity."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vlmedge.errors import UnsupportedError
from vlmedge.runtimes import Memory
from vlmedge.runtimes.cores import physical_cores
from vlmedge.runtimes.ggml_file import GgufFile
from vlmedge.runtimes.ggml_matmul import GgmlMatmuls
from vlmedge.runtimes.llamacpp_decoder import Decoder, KvType
from vlmedge.runtimes.llamacpp_heads import Projector, RegionHeads
from vlmedge.runtimes.llamacpp_native import load_native
from vlmedge.runtimes.llamacpp_units import Device, choose_device, devices
from vlmedge.runtimes.llamacpp_vision import VisionTower
from vlmedge.runtimes.native_thread import natively
from vlmedge.runtimes.units import CPU
from vlmedge.session import F32, I32, U8, Grid, Step
from vlmedge.spec import ModelSpec

_BATCH = 512  # llama.cpp's own piece of a long prompt


def text_file(folder: Path) -> Path:
    """text.gguf, or the first of its parts: llama.cpp finds the others by their names."""
    parts = sorted(folder.glob("text-00001-of-*.gguf"))
    return parts[0] if parts else folder / "text.gguf"


class LlamaCppSession:
    """A `Session` over text.gguf (or its parts), mmproj.gguf and, where the model has region heads, heads.gguf."""

    runtime = "llamacpp"

    @natively
    def __init__(
        self,
        spec: ModelSpec,
        folder: Path,
        *,
        threads: int | None = None,
        memory: Memory = "fast",
        kv_type: KvType = "f16",
        provider: str | None = None,
    ) -> None:
        """Open the bundle's files. `threads`: None for the physical cores.

        `provider`: the unit that computes tower and decoder, None for the CPU. Projector, embeddings and region heads,
        which stock llama.cpp has no place for, are always the CPU's.

        `memory`: "fast" reads the decoder's weights into the layout that computes fastest; "lean" maps the file, and
        holds the tower (which mtmd cannot map) only while it encodes.
        Raises BundleError for a file that is missing, truncated or of another model, UsageError for a unit that is
        none, RuntimeFailedError for one that cannot be used here or where the native library fails.
        """
        self._spec, self._memory, self._kv_type = spec, memory, kv_type
        self._threads = threads or physical_cores()
        text, mmproj = GgufFile(text_file(folder)), GgufFile(folder / "mmproj.gguf")
        heads = GgufFile(folder / "heads.gguf") if spec.region or spec.projector.joins_global else None
        self._native = load_native()
        self._device = self._find_device(provider)
        with ExitStack() as opened:
            self._matmuls = GgmlMatmuls(self._native.ggml, self._threads)
            opened.callback(self._matmuls.close)
            self._decoder = self._open_decoder(text.path)
            opened.callback(self._decoder.close)
            self._mmproj = mmproj.path
            self._tower = self._open_tower()
            opened.callback(self._tower.close)
            if memory == "lean":
                self._tower.close()  # opened once, so that a file that cannot be used is found now
            self._projector = Projector(self._matmuls, mmproj, heads, spec)
            self._region = RegionHeads(self._matmuls, heads, spec.region.activation) if heads and spec.region else None
            self._text = text
            self._close = weakref.finalize(self, natively(opened.pop_all().close))

    @property
    def position(self) -> int:
        """Positions in the KV cache."""
        self._check_open()
        return self._decoder.position

    @property
    def context(self) -> int:
        """Positions that the KV cache can hold."""
        return self._spec.decoder.context

    @natively
    def vision(self, pixels: U8) -> F32:
        """uint8 [n, size, size, 3] -> float32 [n, tokens, width], after the tower's last norm."""
        self._check_open()
        if self._memory == "fast":
            return self._tower.encode(pixels)
        tower = self._open_tower()
        try:
            return tower.encode(pixels)
        finally:
            tower.close()

    @natively
    def project(self, features: F32, tiling: Grid) -> F32:
        """float32 [crops, tokens, width] -> float32 [image_tokens, decoder width]."""
        self._check_open()
        return self._projector.run(features, tiling)

    @natively
    def embed(self, ids: I32) -> F32:
        """int32 [n] -> float32 [n, width]; only these rows of the table are dequantized."""
        self._check_open()
        return self._matmuls.rows(self._text, "token_embd.weight", ids)

    @natively
    def forward(
        self, inputs: F32 | I32, *, bidirectional: bool = False, hidden: bool = False, every: bool = False
    ) -> Step:
        """Append positions to the KV cache; see `Session.forward`. Raises ContextError where they do not fit."""
        self._check_open()
        return self._decoder.forward(inputs, bidirectional=bidirectional, hidden=hidden, every=every)

    @natively
    def head(self, name: str, inputs: F32) -> F32:
        """Run a region head on one vector; raises UnsupportedError for a model without region heads."""
        self._check_open()
        if self._region is None:
            raise UnsupportedError(f"this {self._spec.family} bundle has no region heads")
        return self._region.run(name, inputs)

    @natively
    def rewind(self, position: int) -> None:
        """Forget every position from `position` on."""
        self._check_open()
        self._decoder.rewind(position)

    def info(self) -> dict[str, Any]:
        """Versions, threads, memory mode, llama.cpp's line about the build and the processor, and what computes where.

        `unit` computes tower and decoder. `weights_mib`: where llama.cpp put the decoder's weights, by its own account.
        """
        unit = self._device.unit if self._device else CPU
        return {
            "unit": unit,
            "device": f"{self._device.name} ({self._device.description})" if self._device else CPU,
            "computes": {"tower": unit, "decoder": unit, "projector": CPU, "embeddings": CPU, "region heads": CPU},
            "weights_mib": dict(self._decoder.weights_mib),
            "llama_cpp_python": self._native.version,
            "system": self._native.llama.llama_print_system_info().decode(),
            "threads": self._threads,
            "memory": self._memory,
            "kv_cache": self._kv_type,
        }

    def close(self) -> None:
        """Free tower, decoder and backend, in that order; may be called again."""
        self._close()

    def _check_open(self) -> None:
        if not self._close.alive:  # native code would read freed memory
            raise ValueError("this session is closed")

    def _open_tower(self) -> VisionTower:
        return VisionTower(
            self._native, self._mmproj, self._decoder.model, self._spec.vision, self._threads, self._device
        )

    def _find_device(self, wanted: str | None) -> Device | None:
        if wanted in (None, CPU):
            return None
        return choose_device(devices(self._native.ggml), self._native.llama.llama_supports_gpu_offload(), wanted)

    def _open_decoder(self, path: Path) -> Decoder:
        spec = self._spec
        whole_picture = -(-(spec.image_tokens + 1) // 64) * 64 if spec.decoder.bidirectional_prefix else 0
        return Decoder(
            self._native,
            path,
            spec.decoder,
            threads=self._threads,
            memory=self._memory,
            kv_type=self._kv_type,
            batch=min(spec.decoder.context, max(_BATCH, whole_picture)),
            device=self._device,
        )
