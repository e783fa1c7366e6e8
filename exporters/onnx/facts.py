"""What graphs say of their model in operators, attributes and declared shapes, for comparison with its spec."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from vlmedge.errors import BundleError
from vlmedge.exporters.onnx.flavour import Flavour
from vlmedge.exporters.onnx.opened import Dim, GraphFile, attribute
from vlmedge.spec import Activation, DecoderSpec, ModelSpec

_NORMS = {"LayerNormalization": "layer", "SimplifiedLayerNormalization": "rms", "RMSNormalization": "rms"}
_QUICK = {1.702: "quick_gelu", 1.0: "silu"}  # steepness of x * sigmoid(steepness * x)
_ROUNDING = 2.0**-21  # of an angle in float32, relative: the power, the division and the product round
_NEAR = 2e-6  # of a base worked out from one such angle, relative
Facts = dict[str, Any]
# What graphs of every flavour state of every model, and what only those of one do; `_sometimes` adds the rest.
_STATED: dict[str, tuple[str, ...]] = {
    "decoder": ("layers", "kv_heads", "head_dim", "width", "vocab", "bidirectional_prefix", "norm", "norm_eps"),
    "vision": ("layers", "heads", "width", "channels", "image_size", "patch_size", "norm_eps"),
}
_STATED_BY: dict[Flavour, tuple[str, ...]] = {"ort": ("decoder.heads",), "portable": ()}
_SPELT_OUT: dict[Flavour, tuple[Activation, ...]] = {"ort": (), "portable": ("silu", "quick_gelu")}  # Mul and Sigmoid
_DIGITS = 4  # of a rotary base
_RESAMPLE = {1: "lanczos", 3: "bicubic"}  # PIL.Image.Resampling


def facts_of(graphs: Mapping[str, GraphFile]) -> Facts:
    """Dotted path into ModelSpec -> value, of what these graphs state beyond doubt.

    Where nodes of one graph disagree, the value is a sorted tuple of all that they say, which no spec has. Both
    flavours state sizes, epsilons and rotary tables; the heads of queries only "ort" (attributes of
    GroupQueryAttention); activations both, but for those that "portable" spells out in Mul and Sigmoid.
    """
    decoders = [graph for name, graph in graphs.items() if name in ("decoder_model_merged", "decoder_prefill")]
    out: Facts = {}
    for key, values in _decoder(decoders).items():
        out |= _agreed(f"decoder.{key}", values)
    for key, values in _vision(graphs["vision_encoder"]).items():
        out |= _agreed(f"vision.{key}", values)
    out |= _agreed("projector.activation", _activations(graphs["vision_projection"]))
    for part in ("coord", "size"):
        if f"region_{part}_decoder" in graphs:
            out |= _agreed("region.activation", _activations(graphs[f"region_{part}_decoder"]))
    return out


def flavour_in(graphs: Iterable[GraphFile]) -> Flavour:
    """The flavour that graphs are of: only "ort" has operators of ONNX Runtime's own."""
    ours = ("com.microsoft", "SimplifiedLayerNormalization")
    found = any(node.domain == ours[0] or node.op_type == ours[1] for graph in graphs for node in graph.nodes)
    return "ort" if found else "portable"


def expected_facts(spec: ModelSpec, flavour: Flavour) -> Facts:
    """Every fact that graphs of a flavour must state of this model, as None: what `facts_of` does not find stays so."""
    always = (f"{part}.{name}" for part, names in _STATED.items() for name in names)
    return dict.fromkeys((*always, *_STATED_BY[flavour], *_sometimes(spec, flavour)))


def _sometimes(spec: ModelSpec, flavour: Flavour) -> Iterator[str]:
    """What is stated of some models: activations that have an operator, and rotary tables and what they tell."""
    for part in ("vision", "projector", "decoder", "region"):
        block = getattr(spec, part)
        if block is not None and block.activation not in _SPELT_OUT[flavour]:
            yield f"{part}.activation"
    if spec.decoder.rope_dims:
        yield from ("decoder.context", "decoder.rope_dims")
    if _legible(spec.decoder):
        yield "decoder.rope_theta"


def _legible(spec: DecoderSpec) -> bool:
    """Can `rope_theta` find the base in this decoder's tables?"""
    short = float(f"{spec.rope_theta:.{_DIGITS}g}") == spec.rope_theta > 1
    return short and spec.rope_dims > 2 and spec.context > 1


def config_facts(folder: Path) -> Facts:
    """What the small JSON files beside the graphs say, which transformers.js and optimum read.

    Raises BundleError for one that is missing or no JSON object.
    """
    pixels, words = (_config(folder / name) for name in ("preprocessor_config.json", "generation_config.json"))
    size, resample = pixels.get("size"), pixels.get("resample")
    square = isinstance(size, dict) and size.get("height") == size.get("width")
    return {
        "image.size": size.get("height") if isinstance(size, dict) and square else size,
        "image.resample": _RESAMPLE.get(resample, resample) if type(resample) is int else resample,
        "image.mean": _listed(pixels.get("image_mean")),
        "image.std": _listed(pixels.get("image_std")),
        "prompt.stop": _listed(words.get("eos_token_id")),
        "prompt.banned": _listed(words.get("suppress_tokens")),
        "prompt.max_tokens": words.get("max_new_tokens"),
    }


def _listed(value: Any) -> Any:
    """A list as a tuple, one number as a tuple of it (as transformers takes an `eos_token_id`), nothing as none.

    Anything else as it is: no spec has it.
    """
    if value is None or isinstance(value, list):
        return tuple(value or ())
    return (value,) if type(value) is int else value


def _config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise BundleError(f"{path} is missing or no JSON object; copy or export it again")
    return found


def _agreed(path: str, values: Iterable[Any]) -> Facts:
    """One fact, or none where nothing was said."""
    found = sorted(set(values))
    return {path: found[0] if len(found) == 1 else tuple(found)} if found else {}


def _decoder(graphs: list[GraphFile]) -> dict[str, list[Any]]:
    out: dict[str, list[Any]] = {}

    def say(key: str, values: Iterable[Any]) -> None:
        out.setdefault(key, []).extend(values)

    for graph in graphs:
        pasts = [shape for name, shape in graph.inputs.items() if name.startswith("past_key_values.")]
        say("layers", [len(pasts) // 2])
        say("kv_heads", [*_sizes(pasts, 1), *_attributes(graph, "GroupQueryAttention", "kv_num_heads")])
        say("head_dim", _sizes(pasts, 3))
        say("heads", _attributes(graph, "GroupQueryAttention", "num_heads"))
        say("width", _sizes([graph.inputs.get("inputs_embeds", ())], 2))
        say("vocab", _sizes([graph.outputs.get("logits", ())], 2))
        say("bidirectional_prefix", ["prefix_len" in graph.inputs])
        say("norm", [_NORMS[node.op_type] for node in graph.nodes if node.op_type in _NORMS])
        say("norm_eps", _epsilons(graph))
        say("activation", _activations(graph))
        for key, value in _rotary(graph):
            say(key, [value])
    return out


def _vision(graph: GraphFile) -> dict[str, list[Any]]:
    attentions = [node for node in graph.nodes if node.op_type in ("MultiHeadAttention", "Attention")]
    pixels, features = [graph.inputs.get("pixel_values", ())], [graph.outputs.get("image_features", ())]
    return {
        "layers": [len(attentions)],
        "heads": [*_attributes(graph, "MultiHeadAttention", "num_heads"),
                  *_attributes(graph, "Attention", "q_num_heads")],
        "width": _sizes(features, 2),
        "channels": _sizes(pixels, 1),
        "image_size": [*_sizes(pixels, 2), *_sizes(pixels, 3)],
        "patch_size": [side for node in graph.nodes if node.op_type == "Conv" for side in _strides(node)],
        "norm_eps": _epsilons(graph),
        "activation": _activations(graph),
    }  # fmt: skip


def _sizes(shapes: Iterable[tuple[Dim, ...]], axis: int) -> list[int]:
    """One dimension of each shape, where it is a number."""
    found = [shape[axis] for shape in shapes if len(shape) > axis]
    return [size for size in found if isinstance(size, int)]


def _attributes(graph: GraphFile, op: str, name: str) -> list[int]:
    """Counts that nodes of one kind state."""
    return [value for node in graph.nodes if node.op_type == op and (value := attribute(node, name, 0))]


def _strides(node: onnx.NodeProto) -> list[int]:
    none: list[int] = []
    return [side for side in attribute(node, "strides", none) if isinstance(side, int)]


def _epsilons(graph: GraphFile) -> list[float]:
    """As the shortest decimals that a float32 attribute holds: 1e-05, not 9.999999747378752e-06."""
    return [float(str(np.float32(attribute(node, "epsilon", 1e-5)))) for node in graph.nodes if node.op_type in _NORMS]


def _activations(graph: GraphFile) -> list[str]:
    return [name for node in graph.nodes if (name := _activation(node))]


def _activation(node: onnx.NodeProto) -> str:
    match node.op_type:
        case "FastGelu":
            return "gelu_tanh"
        case "Gelu":
            return "gelu_tanh" if attribute(node, "approximate", b"none") == b"tanh" else "gelu"
        case "QuickGelu":
            alpha = float(str(np.float32(attribute(node, "alpha", 1.702))))
            return _QUICK.get(alpha, f"x * sigmoid({alpha} x)")
    return ""


def _rotary(graph: GraphFile) -> Iterable[tuple[str, Any]]:
    """Of the tables of cosines and sines [context, rope_dims / 2]."""
    places = {"GroupQueryAttention": 7, "RotaryEmbedding": 1}
    read = {tuple(node.input[(at := places[node.op_type]) : at + 2]) for node in graph.nodes if node.op_type in places}
    for names in read:
        cos, sin = (graph.constant(name) for name in names) if len(names) == 2 else (None, None)
        if cos is None or sin is None or cos.ndim != 2 or cos.shape != sin.shape:
            continue
        if not cos.dtype == sin.dtype == np.float32:
            continue
        yield "context", cos.shape[0]
        yield "rope_dims", 2 * cos.shape[1]
        theta = rope_theta(cos, sin)
        if theta is not None:
            yield "rope_theta", theta


def rope_theta(cos: npt.NDArray[np.float32], sin: npt.NDArray[np.float32]) -> float | None:
    """The base of rotary tables [context, dims / 2] with angles position * theta ** (-2 i / dims).

    None where the tables have another form, or one pair of dimensions, which says nothing of it, and for a base of
    more than four digits: with more of them, two that are told apart by no table would be candidates.
    """
    positions, half = cos.shape
    if positions < 2 or half < 2:
        return None
    slowest = math.atan2(float(sin[1, -1]), float(cos[1, -1]))
    if not 0 < slowest < 1:
        return None
    estimate = slowest ** (-half / (half - 1))
    rounded = (float(f"{estimate:.{digits}g}") for digits in range(1, _DIGITS + 1))
    theta = next((theta for theta in rounded if abs(theta / estimate - 1) < _NEAR), None)
    if theta is None:
        return None
    angles = np.outer(np.arange(positions), theta ** (-np.arange(half) / half))
    slack = np.abs(angles) * _ROUNDING * max(1.0, math.log(theta)) + 1e-6
    off = np.maximum(np.abs(np.cos(angles) - cos), np.abs(np.sin(angles) - sin))
    return theta if (off <= slack).all() else None
