"""What ONNX Runtime can compute on here: its execution providers by short names, each tried before it is promised."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from vlmedge.runtimes import units
from vlmedge.runtimes.ort_errors import native_errors
from vlmedge.runtimes.ort_saturation import GRAPH

CPU = "CPUExecutionProvider"
_SUFFIX = "executionprovider"
_RENAMED = {"dml": "directml"}
# Packages of the registry that bring a provider along (each replaces the package onnxruntime, which has the CPU's only,
# and on Macs Core ML's): onnxruntime.ai/docs/install and onnxruntime.ai/docs/execution-providers
_BROUGHT_BY = {
    "cuda": "pip install onnxruntime-gpu in place of onnxruntime; it needs an NVIDIA GPU, CUDA and cuDNN",
    "tensorrt": "pip install onnxruntime-gpu in place of onnxruntime; it needs an NVIDIA GPU, CUDA and TensorRT",
    "coreml": "onnxruntime has it on Macs only",
    "directml": "on Windows, pip install onnxruntime-directml in place of onnxruntime",
    "openvino": "pip install onnxruntime-openvino in place of onnxruntime; it needs a processor or GPU of Intel's",
    "qnn": "on Windows with a Snapdragon, pip install onnxruntime-qnn in place of onnxruntime",
    "migraphx": "pip install onnxruntime-migraphx in place of onnxruntime; it needs an AMD GPU and ROCm",
    "xnnpack": "only builds of your own and those for phones have it: build.sh --use_xnnpack",
}
_NO_UNIT = {"azure": "it asks a service in the cloud, nothing is computed here: use cpu"}


def short(provider: str) -> str:
    """The unit of a provider: "CUDAExecutionProvider", "CUDA" and "cuda" are "cuda"."""
    name = provider.lower().removesuffix(_SUFFIX)
    return _RENAMED.get(name, name)


def ort_units() -> Mapping[str, str]:
    """Every usual unit and every provider of the installed build; see `runtimes.Runtime.units`.

    Providers other than the CPU's are tried with a graph of one node, so a library of theirs or a device that is not
    there is found now. On a GPU that takes its memory, which stays taken as long as this process lives.
    """
    return {name: _why_not(name) for name in _names()}


def choose_provider(wanted: str | None) -> str:
    """Name the execution provider: the CPU's, or the one that `wanted` ("cuda", "CoreMLExecutionProvider") means.

    Only that one is tried. Raises UsageError for a name that is none, RuntimeFailedError where it cannot be used.
    """
    name = units.CPU if wanted is None else short(wanted)
    if name == units.CPU:
        return CPU
    why = {known: _why_not(known) if known == name else "" for known in _names()}
    return _installed()[units.check_unit("onnxruntime", name, why)]


def usual_units() -> tuple[str, ...]:
    """The names that are known without asking ONNX Runtime."""
    return (units.CPU, *_BROUGHT_BY)


def _names() -> list[str]:
    return list(dict.fromkeys((*usual_units(), *_installed())))


def _installed() -> dict[str, str]:
    import onnxruntime

    return {short(name): name for name in onnxruntime.get_available_providers()}


def _why_not(name: str) -> str:
    if name == units.CPU or name in _NO_UNIT:
        return _NO_UNIT.get(name, "")
    provider = _installed().get(name)
    if provider is None:
        return f"this build does not have it: {_BROUGHT_BY[name]}"
    return _tried(provider)


@cache
def _tried(provider: str) -> str:
    """Open a graph of one node with a provider: "", or what came of it in one line."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(GRAPH, options, [provider, CPU], enable_fallback=False)
    except native_errors() as error:
        return f"it does not start ({' '.join(str(error).split())}): {_remedy(provider)}"
    if session.get_providers()[0] != provider:
        return f"one of its libraries or its device is not there: {_remedy(provider)}"
    return ""


def _remedy(provider: str) -> str:
    return f"see what it needs at onnxruntime.ai/docs/execution-providers (this build has {provider})"
