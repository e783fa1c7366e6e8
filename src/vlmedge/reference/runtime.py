"""The original as a runtime: opens a checkpoint in PyTorch."""

from __future__ import annotations

import importlib.util

from vlmedge.errors import MissingExtraError
from vlmedge.runtimes import Opening, Runtime
from vlmedge.session import Session


def missing() -> str | None:
    """None where PyTorch is installed."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed: pip install 'vlmedge[torch]'"
    return None


def open_session(opening: Opening) -> Session:
    """Build the model from the checkpoint's tensors; raises MissingExtraError without PyTorch."""
    if missing():
        raise MissingExtraError("running the original", "torch")
    from vlmedge.reference.session import TorchSession

    if opening.tensors is None:
        raise ValueError("the torch runtime opens checkpoints, not bundles")
    return TorchSession(opening.spec, opening.tensors, dtype=opening.dtype, threads=opening.threads)


RUNTIME = Runtime(name="torch", loads="checkpoint", missing=missing, open=open_session)
