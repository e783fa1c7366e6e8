"""What tests of the ONNX exporter share: small models made up, exports of them, graphs opened and fed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from vlmedge.exporters import EXPORTERS, ExportJob, Order
from vlmedge.exporters.onnx.files import FOLDER
from vlmedge.exporters.onnx.kinds import Kind
from vlmedge.quant_profiles import Scheme
from vlmedge.session import F32
from vlmedge.spec import (
    DecoderSpec,
    ImageSpec,
    MlpProjector,
    ModelSpec,
    OverlapCrops,
    PromptSpec,
    RegionSpec,
    VisionSpec,
)
from vlmedge.tensors import ArrayTensor, Tensor

GOLDEN = Path(__file__).parent / "data/moondream2/tiny-mha"
FLAVOURS = EXPORTERS["onnx"].flavours
FLOATS = Scheme("float", 32)
Array = npt.NDArray[Any]
# A model of every part, small enough to export in 50 ms: 16 image tokens, 2 layers, heads of 32.
TINY = ModelSpec(
    family="made-up",
    vision=VisionSpec(
        layers=2, width=48, heads=2, mlp_width=72, image_size=28, patch_size=7, activation="gelu_tanh", norm_eps=1e-5,
        post_norm=True,
    ),
    projector=MlpProjector(80, "gelu_tanh", joins_global=True),
    decoder=DecoderSpec(
        layers=2, width=64, heads=4, kv_heads=4, head_dim=32, mlp_width=140, vocab=96, context=64, norm="layer",
        norm_eps=1e-5, activation="gelu_tanh", gated=False, parallel_residual=True, rope_dims=16, rope_theta=1e4,
        bias=True, head_bias=True, tied_head=False, bidirectional_prefix=True,
    ),
    region=RegionSpec(16, 32, 24, 32, hidden=40, activation="gelu_tanh", size_scale="log2"),
    image=ImageSpec(28, 7, (0.5, 0.4, 0.5), (0.5, 0.5, 0.6), "lanczos", OverlapCrops(4, 1)),
    prompt=PromptSpec({}, (0,), (), 8, 0.3),
)  # fmt: skip


def made_up(decoder: Mapping[str, Any] | None = None, **changes: Any) -> ModelSpec:
    """TINY with other facts; `decoder` changes the decoder's."""
    return replace(TINY, decoder=replace(TINY.decoder, **(decoder or {})), **changes)


def random_tensors(spec: ModelSpec, seed: int = 1) -> dict[str, Tensor]:
    """Gaussian weights. Scores of attention have a spread of about 2, so that who sees whom decides much."""
    rng = np.random.default_rng(seed)

    def values(name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
        if ".norm" in name or "post_norm" in name:
            return rng.normal(1.0 if name.endswith("weight") else 0.0, 0.2, shape)
        if len(shape) < 2:
            return rng.normal(0, 0.3, shape)
        if (name.startswith("region.") and name.endswith("features")) or name == "decoder.embed.weight":
            return rng.normal(0, 1, shape)
        gain = 1.5 if name.endswith(("attn.q.weight", "attn.k.weight")) else 1.0
        return rng.normal(0, gain, shape) / np.sqrt(np.prod(shape[1:]))

    return {name: ArrayTensor(values(name, shape).astype(np.float32)) for name, shape in spec.tensors().items()}


def order_of(spec: ModelSpec, plan: Mapping[str, Scheme] | None = None, **changes: Any) -> Order:
    """Order floats throughout, but for what `plan` says."""
    whole = dict.fromkeys(spec.tensors(), FLOATS) | dict(plan or {})
    return Order(spec=spec, plan=whole, **{"flavour": "ort", "kv_cache": "f32", **changes})


def job_of(order: Order, tensors: Mapping[str, Tensor], out: Path, **changes: Any) -> ExportJob:
    """An export into `out`, which is created."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = (GOLDEN / "tokenizer.json").read_bytes()
    return ExportJob(order, tensors, tokenizer, "made-up", out, **{"threads": 1, **changes})


def export(order: Order, tensors: Mapping[str, Tensor], out: Path) -> Path:
    """Export into `out`; return the folder of graphs."""
    EXPORTERS["onnx"].write(job_of(order, tensors, out))
    return out / FOLDER


def opened(path: Path, accuracy_level: int = 4) -> Any:
    """A graph in ONNX Runtime, one thread. `accuracy_level`: of DequantizeLinear and MatMul; 4 rounds activations."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(accuracy_level))
    return onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])


def run(session: Any, **feeds: Array) -> dict[str, Array]:
    """Run a graph: output name -> array."""
    names = [node.name for node in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


class Growing:
    """A decoder's graph, its presents fed back as pasts. `run(feeds)` gives the outputs by name."""

    def __init__(self, run: Any, spec: DecoderSpec, dtype: type[np.generic] = np.float32) -> None:
        self._run, self._names = run, [f"{i}.{part}" for i in range(spec.layers) for part in ("key", "value")]
        empty = np.zeros((1, spec.kv_heads, 0, spec.head_dim), dtype)
        self.kv: dict[str, Array] = dict.fromkeys(self._names, empty)
        self.position = 0

    def forward(self, x: F32, keep: int = 0, prefix: int | None = None) -> dict[str, Array]:
        """Append x float32 [n, width]; `prefix`: None to leave the graph's default."""
        feeds = {"inputs_embeds": x[None], "attention_mask": np.ones((1, self.position + len(x)), np.int64)}
        feeds |= {"num_logits_to_keep": np.array(keep, np.int64)}
        feeds |= {} if prefix is None else {"prefix_len": np.array(prefix, np.int64)}
        out = self._run(**feeds, **{f"past_key_values.{name}": value for name, value in self.kv.items()})
        self.kv = {name: out[f"present.{name}"] for name in self._names}
        self.position += len(x)
        return out


def relative(ours: Array, theirs: Array) -> float:
    """RMS of the difference over that of `theirs`; their shapes must be equal."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.linalg.norm(np.float64(ours) - theirs) / max(np.linalg.norm(theirs), 1e-30))


@dataclass(frozen=True)
class Place:
    """Where an initializer's bytes lie."""

    file: str
    offset: int
    length: int


def load(path: Path) -> onnx.ModelProto:
    """A graph without its data."""
    return onnx.load(path, load_external_data=False)


def places(model: onnx.ModelProto) -> dict[str, Place]:
    """Initializer -> place, of those that lie in data files."""
    found = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            facts = {entry.key: entry.value for entry in tensor.external_data}
            found[tensor.name] = Place(facts["location"], int(facts["offset"]), int(facts["length"]))
    return found


def graphs(folder: Path) -> dict[str, onnx.ModelProto]:
    """Graph name -> model, of a folder of graphs."""
    return {path.stem: load(path) for path in sorted(folder.glob("*.onnx"))}


def stored(folder: Path, place: Place, dtype: npt.DTypeLike, shape: Sequence[int]) -> Array:
    """Read stored bytes as an array."""
    raw = (folder / place.file).read_bytes()[place.offset : place.offset + place.length]
    return np.frombuffer(raw, dtype).reshape(shape)


def row_bytes(kind: Kind, columns: int) -> int:
    """Bytes of one row of a matrix with all that belongs to it, counted apart from the exporter."""
    groups = kind.groups(columns)
    codes = (groups * kind.block if kind.block else columns) * kind.bits // 8  # a last short block is stored whole
    if kind.floating:
        return codes
    return codes + groups * (2 if kind.block else 4) + kind.zero_bytes(columns)
