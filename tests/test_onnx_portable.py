"""The portable flavour by ONNX's own reference implementation: what the standard says, ONNX Runtime computes too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from tests.onnx_tools import GOLDEN, Growing, opened, relative, run
from vlmedge import imaging
from vlmedge.exporters import EXPORTERS, ExportJob
from vlmedge.exporters.choice import choose
from vlmedge.loading import describe

SPEC = describe(GOLDEN).spec
DECODER = "decoder_model_merged"
RNG = np.random.default_rng(8)
PROFILES = ("f32", "w8a8", "q4")
FLOATS, ROUNDED = 1e-5, 1e-2  # relative RMS; rounded activations fall on either side of a half
TOWER = 2e-2  # 27 layers of such roundings: pixels that are off by 1e-7 change either side's own features by 1.1e-2
HEADS = {"coord_encoder": 1, "size_encoder": 2, "coord_decoder": SPEC.decoder.width, "size_decoder": SPEC.decoder.width}


class Pair:
    """Graphs of a portable export by the standard and by ONNX Runtime."""

    def __init__(self, profile: str, out: Path) -> None:
        found, order = describe(GOLDEN), choose("onnx", profile, "portable").order(SPEC)
        EXPORTERS["onnx"].write(ExportJob(order, found.tensors, found.tokenizer, "tiny", out, threads=1))
        self.profile, self.folder = profile, out / "onnx"

    def near(self, name: str) -> float:
        """How near both must be: in q4 the words' part multiplies floats with decoded weights."""
        if self.profile == "f32" or (self.profile == "q4" and name in ("embed_tokens", DECODER)):
            return FLOATS
        return TOWER if name == "vision_encoder" else ROUNDED

    def standard(self, name: str) -> Any:
        """A function of feeds, which gives outputs by name."""
        graph = ReferenceEvaluator(str(self.folder / f"{name}.onnx"))
        return lambda **feeds: dict(zip(graph.output_names, graph.run(None, feeds), strict=True))

    def runtime(self, name: str) -> Any:
        """The same in ONNX Runtime, which shall not round what the standard does not."""
        session = opened(self.folder / f"{name}.onnx", accuracy_level=0)
        return lambda **feeds: run(session, **feeds)

    def check(self, name: str, **feeds: np.ndarray) -> None:
        ours, standard = self.runtime(name)(**feeds), self.standard(name)(**feeds)
        assert ours.keys() == standard.keys()
        for key, value in standard.items():
            assert relative(ours[key], value) < self.near(name), (name, key)


@pytest.fixture(scope="module", params=PROFILES)
def pair(request, tmp_path_factory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp(request.param))


def test_vision(pair):
    pixels = RNG.integers(0, 256, (1, SPEC.image.size, SPEC.image.size, 3), np.uint8)
    pair.check("vision_encoder", pixel_values=imaging.normalise(pixels, SPEC.image))


def test_projection(pair):
    index = imaging.stitch_index(SPEC.image, (1, 2))
    rows, columns = (imaging.pool_matrix(n, SPEC.vision.grid) for n in index.shape)
    features = RNG.standard_normal((3, SPEC.vision.tokens, SPEC.vision.width), np.float32)
    pair.check("vision_projection", image_features=features, stitch_index=index, pool_rows=rows, pool_columns=columns)


def test_embedding(pair):
    pair.check("embed_tokens", input_ids=np.array([[0, 511, 7, 7]]))


@pytest.mark.parametrize("head", HEADS)
def test_region_heads(pair, head):
    pair.check(f"region_{head}", input=RNG.random((1, HEADS[head])).astype(np.float32))


def test_decoder(pair):
    """A prefix of 8 positions, a prompt, one position: logits, hidden state, keys and values."""
    both = [Growing(graph(DECODER), SPEC.decoder) for graph in (pair.runtime, pair.standard)]
    for n, prefix in ((8, 8), (3, 0), (1, 0)):
        x = RNG.standard_normal((n, SPEC.decoder.width), np.float32)
        ours, standard = (growing.forward(x, prefix=prefix) for growing in both)
        assert ours.keys() == standard.keys()
        for key, value in standard.items():
            assert relative(ours[key], value) < pair.near(DECODER), (n, key)
        both[0].kv = dict(both[1].kv)  # errors of one call are not those of the next


def test_decoder_needs_no_prefix_length(pair):
    x = RNG.standard_normal((5, SPEC.decoder.width), np.float32)
    ours, again, standard = (
        Growing(graph(DECODER), SPEC.decoder) for graph in (pair.runtime, pair.runtime, pair.standard)
    )
    got = ours.forward(x)["logits"]
    assert relative(got, standard.forward(x)["logits"]) < pair.near(DECODER)
    assert np.array_equal(got, again.forward(x, prefix=0)["logits"])


def test_shapes_are_inferred_and_types_are_the_standards(pair):
    for path in pair.folder.glob("*.onnx"):
        model = onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True, data_prop=True)
        assert all(value.type.tensor_type.elem_type for value in model.graph.value_info)
