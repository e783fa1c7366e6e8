"""ONNX bundles of the golden checkpoint as sessions."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vlmedge.bundle import Bundle
from vlmedge.errors import (
    BundleError,
    ContextError,
    MissingExtraError,
    RuntimeFailedError,
    UnsupportedError,
    UsageError,
)
from vlmedge.imaging import crop
from vlmedge.loading import with_context
from vlmedge.picture import load_picture
from vlmedge.pipeline import export
from vlmedge.runtimes import Opening, onnxruntime
from vlmedge.runtimes.onnxruntime_session import OnnxSession
from vlmedge.runtimes.ort_units import CPU


def exported(golden: Path, folder: Path, profile="f32", flavour="ort") -> Bundle:
    return export(
        golden, "onnx", profile, folder / f"{profile}-{flavour}.onnx", flavour=flavour, verify=False, threads=1
    )


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, golden) -> dict[str, Bundle]:
    """The golden checkpoint as ONNX: both flavours, and a second graph for prefill; not to be written to."""
    folder = tmp_path_factory.mktemp("onnx")
    return {flavour: exported(golden, folder, "f32", flavour) for flavour in ("ort", "portable")} | {
        "turbo": exported(golden, folder, "turbo")
    }


@pytest.fixture(scope="module")
def stages(golden) -> dict[str, np.ndarray]:
    return dict(np.load(golden / "stages.npz"))


def opened_session(bundle: Bundle, folder: Path | None = None, context: int | None = None, **options) -> OnnxSession:
    spec = with_context(bundle.manifest.model, context)
    return onnxruntime.open_session(Opening(spec, folder=folder or bundle.path, threads=1, **options))


def relative(ours, golden) -> float:
    return float(np.linalg.norm(ours - golden) / np.linalg.norm(golden))


@pytest.fixture(scope="module", params=["ort", "portable"])
def session(request, bundles):
    opened = opened_session(bundles[request.param])
    yield opened
    opened.close()


def read(session: OnnxSession, golden: Path, name: str):
    """A picture's features, embeddings, and the step after the prompt of a short caption."""
    spec = session._spec
    cut = crop(load_picture(golden.parent / f"images/{name}.png"), spec.image)
    features = session.vision(cut.pixels)
    projected = session.project(features, cut.tiling)
    session.rewind(0)
    begin = session.embed(np.array(spec.prompt.templates["caption/short"][0].ids, np.int32))
    session.forward(np.concatenate([begin, projected]), bidirectional=True)
    ids = json.loads((golden / "results_fp32.json").read_text())[name]["caption_short"]["prompt_ids"]
    return features, projected, session.forward(np.array(ids, np.int32), hidden=True)


@pytest.mark.parametrize("name", ["small", "big"])
def test_every_stage_agrees_with_the_original(session, golden, stages, name):
    features, projected, step = read(session, golden, name)
    every = -(-729 // stages[f"{name}.projected"].shape[0])  # the file holds every such row
    assert relative(features[:, ::every], stages[f"{name}.features"]) < 1e-5
    assert relative(projected[::every], stages[f"{name}.projected"]) < 1e-5
    assert relative(step.logits, stages[f"{name}.caption_logits"]) < 1e-5
    assert relative(step.hidden, stages[f"{name}.caption_hidden"]) < 1e-5


def test_region_heads_agree_with_the_original(session, stages):
    hidden, sizes = stages["small.region_hidden"], stages["small.region_sizes"]
    for row, golden in zip((0, 1, 3, 4), stages["small.region_coords"], strict=True):
        assert relative(session.head("coord_decoder", hidden[row]), golden) < 1e-5
    for row, golden in zip((2, 5), sizes, strict=True):
        assert relative(session.head("size_decoder", hidden[row]), golden.reshape(-1)) < 1e-5
    width = session._spec.decoder.width
    assert session.head("coord_encoder", np.array([0.25], np.float32)).shape == (width,)
    assert session.head("size_encoder", np.array([0.25, 0.5], np.float32)).shape == (width,)
    with pytest.raises(UnsupportedError, match="no region head 'angle_decoder'"):
        session.head("angle_decoder", hidden[0])
    with pytest.raises(RuntimeFailedError, match="the region head size_encoder"):
        session.head("size_encoder", hidden[0])


def test_logits_of_every_position(session):
    session.rewind(0)
    ids = np.arange(20, dtype=np.int32)
    every = session.forward(ids, every=True)
    assert every.logits.shape == (20, session._spec.decoder.vocab)
    session.rewind(0)
    steps = [session.forward(ids[i : i + 1]).logits for i in range(20)]
    assert relative(np.stack(steps), every.logits) < 1e-5
    assert session.position == 20


def test_lean_memory_maps_the_decoder_and_answers_the_same(bundles, golden, tmp_path):
    fast = opened_session(bundles["turbo"])
    expected = read(fast, golden, "small")
    for _ in range(2):  # written, then found
        lean = opened_session(bundles["turbo"], memory="lean", cache=tmp_path / "cache")
        assert lean.info()["decoder"] == "mapped"
        features, projected, step = read(lean, golden, "small")
        np.testing.assert_array_equal(features, expected[0])
        np.testing.assert_array_equal(projected, expected[1])
        assert relative(step.logits, expected[2].logits) < 1e-5
        assert len(list((tmp_path / "cache/prepacked").iterdir())) == 2
    bare = opened_session(bundles["turbo"], memory="lean")
    assert bare.info()["decoder"] == "held"
    np.testing.assert_array_equal(read(bare, golden, "small")[2].logits, expected[2].logits)


GRAPHS = (
    "vision_encoder", "vision_projection", "embed_tokens", "decoder_model_merged",
    "region_coord_encoder", "region_coord_decoder", "region_size_encoder", "region_size_decoder",
)  # fmt: skip


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_a_bundle_without_one_of_its_graphs_does_not_open(bundles, tmp_path, graph, memory):
    folder = Path(shutil.copytree(bundles["ort"].path, tmp_path / "copy.onnx"))
    (folder / f"onnx/{graph}.onnx").unlink()
    with pytest.raises(BundleError, match=rf"{graph}\.onnx is missing; export it again"):
        opened_session(bundles["ort"], folder, memory=memory)


@pytest.mark.parametrize("graph", GRAPHS[:4])
def test_a_bundle_with_cut_weights_does_not_open_lean(bundles, tmp_path, graph):
    folder = Path(shutil.copytree(bundles["ort"].path, tmp_path / "copy.onnx"))
    weights = folder / f"onnx/{graph}.onnx_data"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(BundleError, match=rf"{graph}\.onnx does not load"):
        opened_session(bundles["ort"], folder, memory="lean")


def test_a_shorter_context(bundles):
    session = opened_session(bundles["ort"], context=740)
    assert session.context == 740
    session.forward(np.zeros((730, session._spec.decoder.width), np.float32), bidirectional=True)
    with pytest.raises(ContextError, match=r"741 positions do not fit the model's context of 740"):
        session.forward(np.arange(11, dtype=np.int32))
    session.forward(np.arange(10, dtype=np.int32))
    assert session.position == 740


def test_facts(bundles):
    session = opened_session(bundles["turbo"], provider="CPU")
    facts = session.info()
    assert facts["onnxruntime"].count(".") == 2
    assert {k: v for k, v in facts.items() if k != "onnxruntime"} == {
        "unit": "cpu", "provider": CPU, "on_cpu": {}, "threads": 1, "memory": "fast", "decoder": "held",
        "kv_cache": "int8", "kv_cache_in": "cpu", "flavour": "ort",
    }  # fmt: skip
    with pytest.raises(UsageError, match="the runtime 'onnxruntime' has no unit 'warp'"):
        opened_session(bundles["ort"], provider="warp")


def test_a_closed_session_says_so(bundles):
    session = opened_session(bundles["ort"])
    ids = np.zeros(1, np.int32)
    with pytest.raises(ValueError, match="not empty"):
        session.forward(ids[:0])
    session.close()
    session.close()
    for use in (
        lambda: session.position,
        lambda: session.rewind(0),
        lambda: session.forward(ids),
        lambda: session.embed(ids),
    ):
        with pytest.raises(ValueError, match="session is closed"):
            use()
    assert session.info()["threads"] == 1


def test_a_checkpoint_is_not_an_onnx_bundle(bundles):
    with pytest.raises(BundleError, match="vlmedge export --format onnx"):
        onnxruntime.open_session(Opening(bundles["ort"].manifest.model))


def test_what_is_missing_comes_with_its_remedy(monkeypatch, bundles):
    import onnxruntime as native

    assert onnxruntime.missing() is None
    for version, said in (("1.29.0", "1.29.0 is too old"), ("", "of no version is too old")):
        monkeypatch.setattr(native, "__version__", version)
        assert said in str(onnxruntime.missing())
        with pytest.raises(RuntimeFailedError, match="pip install --upgrade onnxruntime"):
            opened_session(bundles["ort"])
    for version in ("1.30.0", "1.33.0.dev20261101"):
        monkeypatch.setattr(native, "__version__", version)
        assert onnxruntime.missing() is None
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "cannot be imported" in str(onnxruntime.missing())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "is not installed" in str(onnxruntime.missing())
    with pytest.raises(MissingExtraError, match="onnxruntime"):
        opened_session(bundles["ort"])


def test_onnx_runtime_reports_nothing_home(tmp_path):
    """Its import alone would write a device id and a queue of events into the user's cache."""
    code = "import vlmedge, onnxruntime; print(onnxruntime.__version__)"
    words = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment = words | {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
    assert list(tmp_path.iterdir()) == []
