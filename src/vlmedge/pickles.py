"""Weights saved with torch.save: refused with the way to convert them, or read by torch's restricted loader."""

from __future__ import annotations

import json
import pickle
import shlex
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmedge.errors import CheckpointError, MissingExtraError
from vlmedge.session import F32
from vlmedge.tensors import Tensor

if TYPE_CHECKING:
    import torch

INDEX = "pytorch_model.bin.index.json"
KNOWN = ("pytorch_model.bin", "consolidated.pth", "model.pt")
# What trainers leave beside the weights.
NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin", "scaler.bin", "random_states.bin")
SAFE_TORCH = (2, 6)  # CVE-2025-32434: before, weights_only could be made to run code
# All that a damaged or hostile stream was seen to raise inside the restricted loader.
_BROKEN = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError),
    *(TypeError, AttributeError, AssertionError, ArithmeticError, MemoryError, struct.error),
)


class TorchTensor(Tensor):
    """A tensor of torch, mapped from its file; rows become float32 when they are read."""

    def __init__(self, tensor: torch.Tensor, name: str, dtype: str) -> None:
        self._tensor, self.name, self.dtype = tensor, name, dtype
        self.shape = tuple(int(n) for n in tensor.shape)

    def read_rows(self, start: int, stop: int) -> F32:
        """Rows start..stop as float32; raises CheckpointError for a dtype that holds no weights."""
        if self.dtype not in ("f32", "f16", "bf16"):
            raise CheckpointError(f"{self.name!r} has the dtype {self.dtype}; weights must be F32, F16, BF16")
        part = self._tensor[start:stop] if len(self.shape) > 1 else self._tensor
        rows: F32 = part.float().numpy().reshape(stop - start, self.columns)
        return np.ascontiguousarray(rows)


def select_pickles(names: Iterable[str]) -> list[str]:
    """The names that hold pickled weights, out of a folder's plain file names: one whole file, or its shards."""
    found = set(names)
    if INDEX in found:
        return sorted(name for name in found if name.startswith("pytorch_model-") and name.endswith(".bin"))
    known = [name for name in KNOWN if name in found]
    loose = sorted(name for name in found if name.endswith((".bin", ".pth", ".pt")) and name not in NO_WEIGHTS)
    return known[:1] or loose


def open_pickles(folder: Path, paths: Iterable[Path], allow: bool) -> tuple[dict[str, Tensor], tuple[Path, ...]]:
    """Return the tensors of pickled weights (lazily mapped) and the files that hold them.

    `paths` are those that `select_pickles` names. Raises CheckpointError unless `allow`, with the command
    that converts them; for a file that is damaged or holds more than a plain table of tensors, of which
    nothing is run; MissingExtraError without torch.
    """
    files = tuple(paths)
    if not allow:
        raise CheckpointError(
            f"{folder} has pickled weights ({files[0].name}), which can run code when they are read; convert them: "
            f"{conversion(files)} ; or read them with torch's restricted loader: --allow-pickle"
        )
    wanted = _shards(folder)
    missing = sorted(set(wanted) - {path.name for path in files})
    if missing:
        raise CheckpointError(f"the shard {missing[0]} is missing from {folder}; download it again")
    files = tuple(path for path in files if not wanted or path.name in wanted)
    tensors: dict[str, Tensor] = {}
    for path in files:
        for name, tensor in _load(path).items():
            if name in tensors:
                raise CheckpointError(f"two files of {folder} hold {name!r}, the second is {path.name}")
            tensors[name] = tensor
    return tensors, files


def conversion(files: Iterable[Path]) -> str:
    """The shell command that writes a safetensors file beside every one of `files`."""
    paths = [path.absolute().as_posix() for path in files]
    listed = f"{paths}" if len(paths) < 3 else f"glob.glob({paths[0].rpartition('/')[0] + '/pytorch_model-*.bin'!r})"
    code = (
        "import glob, torch; from safetensors.torch import save_file; "
        "[save_file({k: v.clone().contiguous() for k, v in "
        "torch.load(p, map_location='cpu', weights_only=True).items()}, "
        f"p + '.safetensors') for p in {listed}]"
    )
    plain = not any(mark in code for mark in '"$`\\!%')  # then one quoting serves sh, cmd and PowerShell
    return f'python -c "{code}"' if plain else f"python -c {shlex.quote(code)}"


def _shards(folder: Path) -> set[str]:
    """The shards that the index names; empty without an index."""
    path = folder / INDEX
    if not path.is_file():
        return set()
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
        return {str(name) for name in names}
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path} has no table 'weight_map'; download it again") from None


def _load(path: Path) -> dict[str, Tensor]:
    torch = _torch()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error says it in one line
            # The format before torch 1.6 cannot be mapped.
            table = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except _BROKEN as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"{path.name} is damaged or holds more than tensors, and nothing of it was run ({reason}); "
            "save it again as safetensors, or get the checkpoint from its author"
        ) from None
    if not isinstance(table, Mapping):
        raise CheckpointError(f"{path.name} holds a {type(table).__name__}, not a table of tensors")
    return {str(name): _tensor(path, str(name), value) for name, value in table.items()}


def _tensor(path: Path, name: str, value: Any) -> Tensor:
    torch = _torch()
    if not isinstance(value, torch.Tensor):
        kind = type(value).__name__
        raise CheckpointError(
            f"{path.name} is no plain table of tensors: {name[:100]!r} is a {kind}; save its weights alone"
        )
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        raise CheckpointError(f"{path.name}: {name[:100]!r} is not a dense tensor in memory; save its weights alone")
    names = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
    dtype = names.get(value.dtype, str(value.dtype).removeprefix("torch."))
    return TorchTensor(value.detach(), name, dtype)


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise MissingExtraError("pickled weights", "torch") from None
    version = tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2])
    if version < SAFE_TORCH:
        raise CheckpointError(
            f"torch {torch.__version__} cannot read pickles safely (CVE-2025-32434): pip install 'torch>=2.6'"
        )
    return torch
