"""An ONNX bundle as a session: every step a graph of its own in ONNX Runtime, the KV cache in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vlmedge.errors import UnsupportedError
from vlmedge.runtimes import Memory
from vlmedge.runtimes.cores import physical_cores
from vlmedge.runtimes.ort_decoder import Decoder
from vlmedge.runtimes.ort_engine import Engine
from vlmedge.runtimes.ort_prepacked import PrepackedGraphs
from vlmedge.runtimes.ort_stages import HEADS, Embedding, RegionHeads, VisionTower
from vlmedge.runtimes.ort_units import CPU, choose_provider
from vlmedge.session import F32, I32, U8, Grid, Step
from vlmedge.spec import ModelSpec


class OnnxSession:
    """A `Session` over the graphs in a bundle's folder `onnx`."""

    runtime = "onnxruntime"

    def __init__(
        self,
        spec: ModelSpec,
        folder: Path,
        *,
        threads: int | None = None,
        memory: Memory = "fast",
        cache: Path | None = None,
        provider: str | None = None,
    ) -> None:
        """Open the bundle's graphs. `threads`: None for the physical cores. `provider`: None for the CPU's.

        `memory`: "fast" holds every matrix in the layout that computes fastest; "lean" opens the tower and the
        projection only while they compute and, where `cache` names a folder for files of this machine, maps a copy
        of the decoder in that layout, which is written there when the bundle is first opened.
        Raises BundleError for a file that is missing, damaged or of another model, UsageError for an unknown provider,
        RuntimeFailedError for one that cannot be used here or would leave most of a graph to the CPU.
        """
        self._spec, self._memory = spec, memory
        self._engine = engine = Engine(choose_provider(provider), threads or physical_cores())
        graphs = folder / "onnx"
        kept = cache / "prepacked" if cache and memory == "lean" and engine.provider == CPU else None
        opener = PrepackedGraphs(kept, engine) if kept else engine
        self._decoder = Decoder(graphs, spec.decoder, opener, memory)
        self._embedding = Embedding(graphs, engine)
        self._tower = VisionTower(graphs, spec, engine, memory)
        self._region = RegionHeads(graphs, engine) if spec.region else None
        self._info = self._facts(mapped=kept is not None)
        self._open = True

    @property
    def position(self) -> int:
        """Positions in the KV cache."""
        self._check_open()
        return self._decoder.position

    @property
    def context(self) -> int:
        """Positions that the KV cache can hold."""
        return self._spec.decoder.context

    def vision(self, pixels: U8) -> F32:
        """uint8 [n, size, size, 3] -> float32 [n, tokens, width]."""
        self._check_open()
        return self._tower.encode(pixels)

    def project(self, features: F32, tiling: Grid) -> F32:
        """float32 [crops, tokens, width] -> float32 [image_tokens, decoder width]."""
        self._check_open()
        return self._tower.project(features, tiling)

    def embed(self, ids: I32) -> F32:
        """int32 [n] -> float32 [n, width]."""
        self._check_open()
        return self._embedding.rows(ids)

    def forward(
        self, inputs: F32 | I32, *, bidirectional: bool = False, hidden: bool = False, every: bool = False
    ) -> Step:
        """Append positions to the KV cache; see `Session.forward`. Raises ContextError where they do not fit."""
        self._check_open()
        self._decoder.check(len(inputs))
        if np.issubdtype(inputs.dtype, np.integer):
            inputs = self._embedding.rows(inputs.astype(np.int32))
        x = np.asarray(inputs, np.float32)
        return self._decoder.forward(x, bidirectional=bidirectional, hidden=hidden, every=every)

    def head(self, name: str, inputs: F32) -> F32:
        """Run a region head on one vector; raises UnsupportedError for a model without that head."""
        self._check_open()
        if self._region is None or name not in HEADS:
            raise UnsupportedError(f"this {self._spec.family} bundle has no region head '{name}'")
        return self._region.run(name, inputs)

    def rewind(self, position: int) -> None:
        """Forget every position from `position` on."""
        self._check_open()
        self._decoder.rewind(position)

    def info(self) -> dict[str, Any]:
        """Version, unit, execution provider, threads, memory mode, the KV cache's type and place, the graphs' flavour.

        `on_cpu`: by file, the operators that ONNX Runtime left to the CPU though another unit was asked for, in words.
        """
        return self._info | {"on_cpu": dict(self._engine.on_cpu)}

    def close(self) -> None:
        """Free every graph and the KV cache; may be called again."""
        if self._open:
            self._open = False
            del self._decoder, self._embedding, self._tower, self._region

    def _check_open(self) -> None:
        if not self._open:
            raise ValueError("this session is closed")

    def _facts(self, *, mapped: bool) -> dict[str, Any]:
        import onnxruntime

        return {
            "onnxruntime": onnxruntime.__version__,
            "unit": self._engine.unit,
            "provider": self._engine.provider,
            "threads": self._engine.threads,
            "memory": self._memory,
            "decoder": "mapped" if mapped else "held",
            "kv_cache": self._decoder.properties.get("vlmedge.kv_type", "f32"),
            "kv_cache_in": self._decoder.memory,
            "flavour": "portable" if self._decoder.growing else "ort",
        }
