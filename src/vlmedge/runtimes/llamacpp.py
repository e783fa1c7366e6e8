"""GGUF bundles through llama-cpp-python: whether it can run here, and how a bundle is opened."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Mapping
from typing import Literal

from vlmedge.errors import BundleError, MissingExtraError, RuntimeFailedError
from vlmedge.runtimes import Opening, Runtime
from vlmedge.session import Session

_OLDEST = (0, 3, 36)


def missing() -> str | None:
    """None where llama-cpp-python is installed, new enough, and not known to crash on this machine."""
    if importlib.util.find_spec("llama_cpp") is None:
        return f"llama-cpp-python is not installed: {_install_line()}"
    version = importlib.metadata.version("llama-cpp-python")
    if tuple(int(part) for part in version.split(".")[:3] if part.isdigit()) < _OLDEST:
        return f"llama-cpp-python {version} is too old: {_install_line()}"
    from vlmedge.runtimes.llamacpp_probe import known_failure

    return known_failure()


def units() -> Mapping[str, str]:
    """The CPU, the GPUs that the installed build finds, and why the usual others are not there."""
    from vlmedge.runtimes.llamacpp_units import devices, units_of, usual_units

    if line := missing():
        return dict.fromkeys(usual_units(), line)
    from vlmedge.runtimes.llamacpp_native import load_native

    try:
        native = load_native()
    except RuntimeFailedError as error:
        return dict.fromkeys(usual_units(), str(error))
    return units_of(devices(native.ggml), native.llama.llama_supports_gpu_offload())


def open_session(opening: Opening) -> Session:
    """Open a GGUF bundle's folder.

    Raises MissingExtraError without llama-cpp-python, RuntimeFailedError where the installed build crashes on this
    machine (tried once, in a child process) or the unit that is asked for cannot be used, UsageError for a unit that is
    none, BundleError for files that are missing or damaged.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        raise MissingExtraError("running GGUF bundles", "llamacpp")
    from vlmedge.runtimes.llamacpp_probe import check
    from vlmedge.runtimes.llamacpp_session import LlamaCppSession

    if opening.folder is None:
        raise BundleError("the llamacpp runtime opens GGUF bundles, not checkpoints: vlmedge export --format gguf")
    check()
    kv_type: Literal["f16", "f32"] = "f32" if opening.kv_cache == "f32" else "f16"
    return LlamaCppSession(
        opening.spec,
        opening.folder,
        threads=opening.threads,
        memory=opening.memory,
        kv_type=kv_type,
        provider=opening.provider,
    )


def _install_line() -> str:
    line = "pip install 'vlmedge[llamacpp]'"
    if sys.platform.startswith("linux") and platform.machine() in ("x86_64", "AMD64"):
        from vlmedge.runtimes.llamacpp_probe import FLAGS

        return f"{FLAGS} {line}"  # cures a crash on processors with AMX, harmless on others
    return line


RUNTIME = Runtime(
    name="llamacpp", loads="gguf", missing=missing, open=open_session, units=units, libraries=("llama_cpp",)
)
