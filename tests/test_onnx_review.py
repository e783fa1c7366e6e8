"""What a review of the ONNX work found wrong, each as the case that showed it."""

from __future__ import annotations

import http.client
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import vlmedge
from tests.onnx_tools import FLOATS, TINY, export, load, made_up, order_of, random_tensors, relative
from vlmedge.demo.serve import Subject, serving
from vlmedge.errors import BundleError, OutputError, RuntimeFailedError
from vlmedge.exporters.onnx.flavour import FLAVOURS
from vlmedge.reference.session import TorchSession
from vlmedge.runtimes.onnxruntime_session import OnnxSession
from vlmedge.runtimes.ort_engine import Engine
from vlmedge.runtimes.ort_prepacked import PrepackedGraphs
from vlmedge.runtimes.ort_units import CPU
from vlmedge.spec import ModelSpec

DECODER = "onnx/decoder_model_merged.onnx"


@pytest.fixture
def exported(tmp_path) -> Path:
    """TINY in f32, to be damaged."""
    return export(order_of(TINY), random_tensors(TINY), tmp_path / "bundle").parent


def logits(session: Any, spec: ModelSpec) -> np.ndarray:
    """Logits after a picture's worth of positions, after more than a prefill graph takes, and after single ones."""
    x = np.random.default_rng(0).standard_normal((40, spec.decoder.width), np.float32)
    session.rewind(0)
    steps = [session.forward(x[:17], bidirectional=spec.decoder.bidirectional_prefix)]
    steps += [session.forward(x[17:18]), session.forward(x[18:30])]
    session.rewind(17)
    steps += [session.forward(x[30:40]), session.forward(x[18:19])]
    return np.stack([step.logits for step in steps])


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_decoder_that_rotates_nothing(tmp_path, flavour):
    spec = made_up({"rope_dims": 0, "kv_heads": 2})
    tensors = random_tensors(spec)
    export(order_of(spec, flavour=flavour), tensors, tmp_path)
    wanted = logits(TorchSession(spec, tensors, threads=1), spec)
    assert relative(logits(OnnxSession(spec, tmp_path, threads=1), spec), wanted) < 2e-6


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_file_for_each_array_of_graphs_that_share_them(tmp_path, flavour):
    spec = made_up({"tied_head": True, "head_bias": False})
    layers = [name for name, shape in spec.tensors().items() if name.startswith("decoder.layers.") and len(shape) > 1]
    order = order_of(spec, flavour=flavour, prefill=dict.fromkeys(layers, FLOATS))
    export(order, random_tensors(spec), tmp_path / "whole")
    export(replace(order, max_part=1), random_tensors(spec), tmp_path / "cut")
    assert len(list((tmp_path / "cut/onnx").glob("decoder_model_merged.onnx_data*"))) > 20
    sessions = [OnnxSession(spec, tmp_path / name, threads=1) for name in ("whole", "cut")]
    np.testing.assert_array_equal(*(logits(session, spec) for session in sessions))


def without_hidden(graph: onnx.GraphProto) -> None:
    graph.output.remove(next(value for value in graph.output if value.name == "hidden"))


def strange_past(graph: onnx.GraphProto, type_: int, dims: int) -> None:
    past = graph.input.add()
    past.CopyFrom(next(value for value in graph.input if value.name == "past_key_values.0.key"))
    past.name, past.type.tensor_type.elem_type = "past_key_values.9.key", type_
    del past.type.tensor_type.shape.dim[dims:]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (without_hidden, "hidden"),
        (lambda graph: strange_past(graph, onnx.TensorProto.BFLOAT16, 4), "past_key_values.9.key is tensor.bfloat16"),
        (lambda graph: strange_past(graph, onnx.TensorProto.FLOAT, 2), "cannot be keys or values"),
    ],
)
def test_a_decoder_of_another_kind_is_one_line(exported, change: Callable[[onnx.GraphProto], None], text):
    model = load(exported / DECODER)
    change(model.graph)
    (exported / DECODER).write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=rf"does not load: .*{text}.*export it again"):
        OnnxSession(TINY, exported, threads=1)


@pytest.mark.parametrize("place", ["../secret", "sub/../../secret", "link", "{absolute}"])
def test_weights_outside_the_bundle_are_not_read(exported, place):
    """ONNX Runtime refuses; were it to stop, we would have to."""
    secret = exported.parent / "secret"
    secret.write_bytes(bytes(1 << 16))
    (exported / "secret").write_bytes(bytes(1 << 16))
    (exported / "onnx/link").symlink_to(secret)
    model = load(exported / "onnx/embed_tokens.onnx")
    (table,) = (t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
    table.external_data[0].value = place.format(absolute=secret)
    (exported / "onnx/embed_tokens.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=r"embed_tokens\.onnx does not load"):
        OnnxSession(TINY, exported, threads=1)


class FullDisk(Engine):
    """Cannot save a graph."""

    def open(self, path: Path, *, saved_to: Path | None = None, **options: Any) -> Any:
        if saved_to is not None:
            raise BundleError(f"{path} does not load: Failed to write external initializers to file; export it again")
        return super().open(path, **options)


def test_a_full_cache_is_not_the_bundles_fault(exported, tmp_path):
    graphs = PrepackedGraphs(tmp_path / "cache", FullDisk(CPU, 1))
    with pytest.raises(OutputError, match=r"cache cannot keep .*saving decoder_model_merged.onnx failed") as error:
        graphs.open(exported / DECODER)
    assert "export it again" not in str(error.value)
    assert not list(graphs.folder.iterdir())
    (exported / DECODER).write_bytes(b"\xff" * 100)
    with pytest.raises(BundleError, match="does not load"):
        graphs.open(exported / DECODER)


def test_two_that_prepare_the_same_graph_at_once(exported, tmp_path):
    class Slow(Engine):
        """Another process finishes first."""

        def open(self, path: Path, *, saved_to: Path | None = None, **options: Any) -> Any:
            if saved_to is not None:
                PrepackedGraphs(tmp_path / "cache", Engine(CPU, 1)).open(path)
            return super().open(path, saved_to=saved_to, **options)

    graphs = PrepackedGraphs(tmp_path / "cache", Slow(CPU, 1))
    assert graphs.open(exported / DECODER)
    assert len(list(graphs.folder.iterdir())) == 1


def test_a_copy_that_computes_something_else_is_not_kept(exported, tmp_path):
    """As ONNX Runtime 1.30 and 1.31 save products with 4 and 8 bits in blocks."""
    other = export(order_of(TINY), random_tensors(TINY, seed=2), tmp_path / "other").parent

    class Wrong(Engine):
        def open(self, path: Path, *, saved_to: Path | None = None, **options: Any) -> Any:
            if saved_to is None:
                return super().open(path, **options)
            super().open(other / DECODER, saved_to=saved_to)
            return super().open(path, **options)

    graphs = PrepackedGraphs(tmp_path / "cache", Wrong(CPU, 1))
    with pytest.raises(RuntimeFailedError, match=r"saves decoder_model_merged.onnx so that it computes something else"):
        graphs.open(exported / DECODER)
    assert not list(graphs.folder.iterdir())


@pytest.mark.parametrize("target", ["http://[x/", "//[x", "http://[x/ask?skill=query&text=a"])
def test_the_page_answers_what_is_no_address(tmp_path, capfd, target):
    bundle = vlmedge.export("demo:moondream2", "onnx", "w8a8", tmp_path / "demo.onnx", verify=False, threads=1)
    with vlmedge.load(bundle.path, threads=1) as model, serving(model, Subject("demo", "a test")) as address:
        host = address.split("/")[2]
        for method in ("GET", "POST"):
            connection = http.client.HTTPConnection(host, timeout=10)
            connection.putrequest(method, target, skip_host=True)  # it would read the target
            connection.putheader("Host", host)
            connection.putheader("Origin", f"http://{host}")
            connection.putheader("Content-Length", "0")
            connection.endheaders()
            assert connection.getresponse().status == 404
            connection.close()
    assert "Traceback" not in capfd.readouterr().err
