"""ONNX Runtime's units: providers that do not start, graphs that are left to the CPU, where keys and values lie."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from vlmedge.errors import RuntimeFailedError
from vlmedge.pipeline import export
from vlmedge.runtimes import RUNTIMES, ort_units
from vlmedge.runtimes.ort_engine import Engine
from vlmedge.runtimes.ort_kv import SharedKv, Slot, slots_of
from vlmedge.runtimes.ort_placement import Placement, placement
from vlmedge.runtimes.ort_units import choose_provider

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


@pytest.fixture(scope="module")
def onnx(tmp_path_factory, golden):
    """The golden checkpoint as ONNX."""
    out = tmp_path_factory.mktemp("units") / "golden.onnx"
    return export(golden, "onnx", "f32", out, verify=False, threads=1).path


@pytest.fixture
def untried():
    ort_units._tried.cache_clear()
    yield
    ort_units._tried.cache_clear()


def test_a_provider_of_the_build_that_does_not_start(monkeypatch, untried):
    """As where onnxruntime-gpu is installed and CUDA is not: ONNX Runtime goes on with the CPU and says nothing."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, "FutureExecutionProvider", CPU])
    with pytest.warns(UserWarning, match="not in available provider names"):
        units = RUNTIMES["onnxruntime"].units()
    assert units["cuda"] == (
        "one of its libraries or its device is not there: see what it needs at onnxruntime.ai/docs/execution-providers "
        "(this build has CUDAExecutionProvider)"
    )
    assert "future" in units
    with pytest.raises(RuntimeFailedError, match="one of its libraries or its device is not there"):
        choose_provider("CUDAExecutionProvider")


class Placing:
    """An ONNX Runtime that claims to have CUDA: the CPU computes, operators of the kinds in `taken` count as CUDA's."""

    def __init__(self, monkeypatch, *taken: str) -> None:
        self.taken, self.asked, self.real = taken, [], onnxruntime.InferenceSession
        monkeypatch.setattr(onnxruntime, "InferenceSession", self.open)

    def open(self, path: Any, options: Any, providers: list[Any], **given: Any) -> Any:
        self.asked.append(providers)
        session = self.real(path, options, [CPU], **given)
        session.get_providers = lambda: [CUDA, CPU]
        nodes = [node for part in session.get_provider_graph_assignment_info() for node in part.get_nodes()]
        session.get_provider_graph_assignment_info = lambda: [
            SimpleNamespace(ep_name=CUDA if node.op_type in self.taken else CPU, get_nodes=lambda node=node: [node])
            for node in nodes
        ]
        return session


def test_a_graph_that_is_mostly_the_cpus_is_refused(monkeypatch, onnx):
    placing = Placing(monkeypatch, "Shape", "Gather")
    with pytest.raises(
        RuntimeFailedError, match=r"was to run on 'cuda', which takes 0 of its \d+ products of matrices"
    ):
        Engine(CUDA, 1).open(onnx / "onnx/decoder_model_merged.onnx")
    assert placing.asked == [[(CUDA, {"use_tf32": "0"}), CPU]]


def test_what_is_left_to_the_cpu_is_told(monkeypatch, onnx):
    Placing(monkeypatch, "MatMul", "Gemm", "MatMulNBits")
    engine = Engine(CUDA, 1)
    engine.open(onnx / "onnx/decoder_model_merged.onnx")
    assert engine.unit == "cuda"
    assert "GroupQueryAttention" in engine.on_cpu["decoder_model_merged.onnx"]


def test_a_placement_in_words(onnx):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(onnx / "onnx/vision_projection.onnx", options, [CPU])
    placed = placement(session, CPU)
    assert placed.cpu.total() == 0
    assert placed.unit["Gemm"] + placed.unit["MatMul"] > 0
    mixed = Placement(Counter(MatMul=2), Counter(Gather=1, Shape=3))
    assert str(mixed) == "4 of 6 operators: Shape 3, Gather 1"


class FakeValues:
    """`OrtValue`s of a device that is not there: what was put where, and what was changed later."""

    def __init__(self, monkeypatch) -> None:
        self.made: list[tuple[Any, ...]] = []
        self.updates: list[np.ndarray] = []
        monkeypatch.setattr(onnxruntime, "OrtValue", SimpleNamespace(ortvalue_from_numpy=self.make))

    def make(self, array: np.ndarray, device: str = "cpu", number: int = 0) -> Any:
        self.made.append((device, number))
        return SimpleNamespace(update_inplace=self.updates.append)


class FakeBinding:
    """An `IOBinding` that gives ones as the outputs of a first call."""

    def __init__(self) -> None:
        self.bound: list[tuple[Any, ...]] = []

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self.bound.append((name, value))

    bind_ortvalue_output = bind_ortvalue_input

    def bind_output(self, *given: Any) -> None:
        self.bound.append(given)

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(numpy=lambda: np.ones((1, 2, 3, 4), np.int8))]


def test_keys_and_values_lie_where_the_graph_reads_them(monkeypatch):
    """A past elsewhere would be copied when it is bound, and what a call appends would never be seen again."""
    values, io = FakeValues(monkeypatch), FakeBinding()
    cache = SharedKv([Slot("past", "present", 2, 4, np.int8, ("cuda", 1))], 8, quantized=True)
    assert values.made == [("cuda", 1)]
    cache.bind(io, 0)
    cache.collect(io, 0, 3)
    (uploaded,) = values.updates
    assert uploaded[:, :, :3].all()
    assert not uploaded[:, :, 3:].any()
    (past, value), fresh, *bound = io.bound
    assert (past, fresh) == ("past", ("present", "cpu"))
    assert bound == [("past", value), ("present", value)]


def test_a_memory_that_cannot_be_bound():
    node = SimpleNamespace(name="past_key_values.0.key", type="tensor(float)", shape=[1, 2, "P", 4])
    memory = SimpleNamespace(name="QnnHtpShared", device_id=0)
    session = SimpleNamespace(get_inputs=lambda: [node], get_input_memory_infos=lambda: [memory])
    with pytest.raises(RuntimeFailedError, match=r"keys and values in 'QnnHtpShared' memory.*use the unit cpu"):
        slots_of(session)
    memory.name = "Cuda"
    assert slots_of(session)[0].place == ("cuda", 0)


def test_a_provider_that_computes_elsewhere_is_no_unit(monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["AzureExecutionProvider", CPU])
    with pytest.raises(RuntimeFailedError, match="a service in the cloud"):
        choose_provider("azure")
