"""llama-cpp-python's low-level bindings, silenced; of what they write, errors and where weights lie are kept."""

from __future__ import annotations

import ctypes
import re
from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vlmedge.errors import MissingExtraError, RuntimeFailedError
from vlmedge.runtimes.ggml_library import Ggml, load_ggml

_WARNING = 3  # ggml_log_level: debug, info, warning, error; continuation lines have 5
_CONTINUED = 5
_WEIGHTS = re.compile(rb"(\S+) model buffer size = +([\d.]+) MiB")  # llama-model.cpp, load_tensors


class NativeLog:
    """Takes what the libraries would print; `lines` are the last warnings and errors.

    `weights`: MiB of weights by buffer ("CPU", "CUDA0", ...), of the models that were loaded since it was cleared.
    """

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=6)
        self.weights: dict[str, float] = {}
        self._keep = False

    def take(self, level: int, text: bytes, _user: int | None) -> None:
        """One log event; the libraries call this, and must never see an exception."""
        if text and (found := _WEIGHTS.search(text)):
            name = found[1].decode("utf-8", "replace")
            self.weights[name] = self.weights.get(name, 0.0) + float(found[2])
        if level != _CONTINUED:
            self._keep = level in (_WARNING, _WARNING + 1)
        if self._keep and text and (line := text.decode("utf-8", "replace").strip()):
            self.lines.append(line)

    def failure(self, what: str) -> RuntimeFailedError:
        """An error that says what failed and what the libraries said last."""
        said = "; ".join(self.lines) or "the library gave no reason"
        self.lines.clear()
        return RuntimeFailedError(f"{what}: {' '.join(said.split())}")


@dataclass(frozen=True, slots=True)
class Native:
    """The bindings (`llama`, `mtmd`), the `ggml` below them, and their log; one per process."""

    llama: Any
    mtmd: Any
    ggml: Ggml
    log: NativeLog
    version: str
    _callback: Any

    def fill(self, params: Any, **values: Any) -> Any:
        """Set fields of a parameter struct; raises RuntimeFailedError where this version has no such field."""
        known = {field[0] for field in type(params)._fields_}
        if unknown := values.keys() - known:
            raise RuntimeFailedError(
                f"llama-cpp-python {self.version} has no parameter {sorted(unknown)[0]}: "
                "pip install 'llama-cpp-python==0.3.36' is the version that vlmedge was developed with"
            )
        for name, value in values.items():
            setattr(params, name, value)
        return params


def library_path() -> Path:
    """Where libllama is; raises MissingExtraError or RuntimeFailedError as `load_native` does."""
    return Path(_bindings()[0]._lib._name)


@lru_cache(maxsize=1)
def load_native() -> Native:
    """Load the libraries; raises MissingExtraError where there are none, RuntimeFailedError where they do not load."""
    llama, mtmd, version = _bindings()
    log = NativeLog()
    callback = llama.llama_log_callback(log.take)
    llama.llama_log_set(callback, ctypes.c_void_p(0))
    mtmd.mtmd_log_set(callback, ctypes.c_void_p(0))
    llama.llama_backend_init()
    return Native(llama, mtmd, load_ggml(Path(llama._lib._name)), log, version, callback)


def _bindings() -> tuple[Any, Any, str]:
    try:
        import llama_cpp
        from llama_cpp import llama_cpp as llama
        from llama_cpp import mtmd_cpp as mtmd
    except ImportError:
        raise MissingExtraError("running GGUF bundles", "llamacpp") from None
    except (OSError, RuntimeError) as error:  # the package is there, one of its libraries does not load
        raise RuntimeFailedError(f"llama-cpp-python does not load: {error}; reinstall it") from None
    return llama, mtmd, str(llama_cpp.__version__)
