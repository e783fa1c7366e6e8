"""The original as a runtime: opens a checkpoint in PyTorch, on the CPU or on a GPU."""

from __future__ import annotations

import importlib.util
import platform
import warnings
from collections.abc import Mapping

from vlmedge.errors import MissingExtraError
from vlmedge.runtimes import Opening, Runtime
from vlmedge.runtimes.units import CPU, check_unit
from vlmedge.session import Session

_UNITS = (CPU, "cuda", "mps")


def missing() -> str | None:
    """None where PyTorch is installed."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed: pip install 'vlmedge[torch]'"
    return None


def units() -> Mapping[str, str]:
    """What PyTorch can compute on here; imports it where it is installed.

    AMD's GPUs answer as "cuda" in a build of PyTorch for ROCm.
    """
    if line := missing():
        return dict.fromkeys(_UNITS, line)
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:  # a library that it is linked to is not there
        line = f"PyTorch cannot be imported ({' '.join(str(error).split())}): pip install --force-reinstall torch"
        return dict.fromkeys(_UNITS, line)
    return {CPU: "", "cuda": _cuda(), "mps": _mps()}


def open_session(opening: Opening) -> Session:
    """Build the model from the checkpoint's tensors, on the unit that is asked for.

    Raises MissingExtraError without PyTorch, UsageError for a unit that is none, RuntimeFailedError for one that
    cannot be used here.
    """
    if missing():
        raise MissingExtraError("running the original", "torch")
    if opening.tensors is None:
        raise ValueError("the torch runtime opens checkpoints, not bundles")
    unit = CPU if opening.provider in (None, CPU) else check_unit("torch", str(opening.provider), units())
    from vlmedge.reference.session import TorchSession

    return TorchSession(opening.spec, opening.tensors, dtype=opening.dtype, device=unit, threads=opening.threads)


def _cuda() -> str:
    import torch

    with warnings.catch_warnings(record=True) as said:  # a driver that is too old is told as a warning
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return ""
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"PyTorch {torch.__version__} is built without CUDA: install a build with it, see "
            "pytorch.org/get-started/locally"
        )
    reason = " ".join(str(said[0].message).split()) if said else "the driver shows no GPU to this process"
    return f"PyTorch {torch.__version__} finds no GPU ({reason}): see what nvidia-smi says"


def _mps() -> str:
    import torch

    if torch.backends.mps.is_available():
        return ""
    if platform.system() != "Darwin":
        return "Metal is there on Macs only: use another unit"
    if not torch.backends.mps.is_built():
        return f"PyTorch {torch.__version__} is built without MPS: install a build for macOS on Apple silicon"
    return "PyTorch finds no Metal device: MPS needs macOS 14 or newer and a GPU that this process may use"


RUNTIME = Runtime(
    name="torch",
    loads="checkpoint",
    missing=missing,
    open=open_session,
    units=units,
    libraries=("vlmedge.reference.session",),
)
