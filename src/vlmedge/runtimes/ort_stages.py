"""The graphs around a decoder: vision tower, projection, embedding table and region heads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from vlmedge import imaging
from vlmedge.errors import BundleError
from vlmedge.runtimes import Memory
from vlmedge.runtimes.ort_engine import Engine, InferenceSession
from vlmedge.runtimes.ort_errors import computing
from vlmedge.runtimes.ort_units import CPU
from vlmedge.session import F32, I32, U8, Grid
from vlmedge.spec import ModelSpec

# On a CPU one crop fills every core, and more are no faster: 9 together take 10 to 17 % longer each, and 90 MB apiece.
_CROPS_ON_CPU, _CROPS_ELSEWHERE = 1, 16
HEADS = ("coord_encoder", "coord_decoder", "size_encoder", "size_decoder")


class Held:
    """One graph's session: held open in memory "fast", opened for each use in "lean"."""

    def __init__(self, path: Path, engine: Engine, memory: Memory) -> None:
        """Open the graph, in "lean" only to find now what is wrong with the file. Raises as `Engine.open` does."""
        self._path, self._engine = path, engine
        session = engine.open(path, prepack=memory == "fast")
        self._session: InferenceSession | None = session if memory == "fast" else None

    @contextmanager
    def session(self) -> Iterator[InferenceSession]:
        """The session, for one computation."""
        yield self._session or self._engine.open(self._path)


class VisionTower:
    """vision_encoder.onnx and vision_projection.onnx."""

    def __init__(self, folder: Path, spec: ModelSpec, engine: Engine, memory: Memory) -> None:
        """Open both files; raises BundleError for one that is missing or damaged."""
        self._spec = spec
        self._at_once = _CROPS_ON_CPU if engine.provider == CPU else _CROPS_ELSEWHERE
        self._encoder = Held(folder / "vision_encoder.onnx", engine, memory)
        self._projection = Held(folder / "vision_projection.onnx", engine, memory)

    def encode(self, pixels: U8) -> F32:
        """uint8 [n, size, size, 3] -> float32 [n, tokens, width], in batches of about equal size."""
        vision = self._spec.vision
        out = np.empty((len(pixels), vision.tokens, vision.width), np.float32)
        batches = -(-len(pixels) // self._at_once) or 1
        bounds = np.linspace(0, len(pixels), batches + 1).astype(int)
        with self._encoder.session() as session, computing(f"the vision tower, {len(pixels)} crops"):
            for start, stop in pairwise(bounds):
                values = imaging.normalise(pixels[start:stop], self._spec.image)
                (out[start:stop],) = session.run(["image_features"], {"pixel_values": values})
        return out

    def project(self, features: F32, tiling: Grid) -> F32:
        """float32 [crops, tokens, width] -> float32 [image_tokens, decoder width]."""
        feeds = {"image_features": np.ascontiguousarray(features, np.float32)}
        if self._spec.projector.joins_global:
            feeds |= self._pooling(tiling)
        with self._projection.session() as session, computing("the projection"):
            (out,) = session.run(["image_embeds"], feeds)
        embeddings: F32 = out[0]
        return embeddings

    def _pooling(self, tiling: Grid) -> dict[str, np.ndarray]:
        image = self._spec.image
        side, index = image.size // image.patch_size, imaging.stitch_index(image, tiling)
        rows, columns = (imaging.pool_matrix(n, side) for n in index.shape)
        return {"stitch_index": index, "pool_rows": rows, "pool_columns": columns}


class Embedding:
    """embed_tokens.onnx."""

    def __init__(self, folder: Path, engine: Engine) -> None:
        """Open the file; a gather needs one thread only."""
        self._session = replace(engine, threads=1).open(folder / "embed_tokens.onnx")

    def rows(self, ids: I32) -> F32:
        """int32 [n] -> float32 [n, width]."""
        with computing(f"the embedding of {len(ids)} ids"):
            (out,) = self._session.run(["inputs_embeds"], {"input_ids": np.asarray(ids, np.int64)[None]})
        embeddings: F32 = out[0]
        return embeddings


class RegionHeads:
    """region_*.onnx: each opened when it is first used."""

    def __init__(self, folder: Path, engine: Engine) -> None:
        """Raises BundleError where one of the files is missing."""
        self._paths = {name: folder / f"region_{name}.onnx" for name in HEADS}
        self._engine = engine
        self._sessions: dict[str, InferenceSession] = {}
        for path in self._paths.values():
            if not path.is_file():
                raise BundleError(f"{path} is missing; export it again")

    def run(self, name: str, inputs: F32) -> F32:
        """Run one head on a vector float32 [n] -> float32 [m]."""
        if name not in self._sessions:
            self._sessions[name] = self._engine.open(self._paths[name])
        feeds = {"input": np.ascontiguousarray(inputs, np.float32).reshape(1, -1)}
        with computing(f"the region head {name}"):
            (out,) = self._sessions[name].run(["output"], feeds)
        result: F32 = out.reshape(-1)
        return result
