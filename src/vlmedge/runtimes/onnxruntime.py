"""ONNX bundles through ONNX Runtime: whether it can run here, and how a bundle is opened."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from vlmedge.errors import BundleError, MissingExtraError, RuntimeFailedError
from vlmedge.runtimes import Opening, Runtime
from vlmedge.session import Session

_OLDEST = (1, 30)  # the first that knows every operator and attribute of our graphs
_INSTALL = "pip install --upgrade onnxruntime"


def missing() -> str | None:
    """None where ONNX Runtime (any of its packages) can be imported and is new enough."""
    if importlib.util.find_spec("onnxruntime") is None:
        return f"onnxruntime is not installed: {_INSTALL}"
    try:
        import onnxruntime
    except ImportError as error:  # a system library that it is linked to is not there
        return f"onnxruntime cannot be imported ({' '.join(str(error).split())}): {_INSTALL}"
    version = getattr(onnxruntime, "__version__", "")  # an empty folder of that name has none
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < _OLDEST:
        return f"onnxruntime {version or 'of no version'} is too old: {_INSTALL}"
    return None


def units() -> Mapping[str, str]:
    """The execution providers of the installed ONNX Runtime and the usual others; see `ort_units.ort_units`."""
    from vlmedge.runtimes.ort_units import ort_units, usual_units

    line = missing()
    return dict.fromkeys(usual_units(), line) if line else ort_units()


def open_session(opening: Opening) -> Session:
    """Open an ONNX bundle's folder.

    Raises MissingExtraError without ONNX Runtime, RuntimeFailedError for one that is too old or a unit that cannot
    be used here, UsageError for a unit that is none, BundleError for files that are missing or damaged.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise MissingExtraError("running ONNX bundles", "onnxruntime")
    if line := missing():
        raise RuntimeFailedError(f"ONNX bundles cannot be run here: {line}")
    from vlmedge.runtimes.onnxruntime_session import OnnxSession

    if opening.folder is None:
        raise BundleError("the onnxruntime runtime opens ONNX bundles, not checkpoints: vlmedge export --format onnx")
    return OnnxSession(
        opening.spec,
        opening.folder,
        threads=opening.threads,
        memory=opening.memory,
        cache=opening.cache,
        provider=opening.provider,
    )


RUNTIME = Runtime(
    name="onnxruntime", loads="onnx", missing=missing, open=open_session, units=units, libraries=("onnxruntime",)
)
