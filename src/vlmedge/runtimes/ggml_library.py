"""The ggml inside llama-cpp-python, as ctypes functions: tensors, graphs and the CPU backend."""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from vlmedge.errors import RuntimeFailedError

_P, _I, _I64, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
CPU_DEVICE = 0
TYPE_F32, TYPE_I32 = 0, 26  # ggml_type


class GgmlTensor(ctypes.Structure):
    """`struct ggml_tensor`; `Ggml` checks the layout against the library before anything relies on it."""

    _fields_ = (
        ("type", _I),
        ("buffer", _P),
        ("ne", _I64 * 4),
        ("nb", _SIZE * 4),
        ("op", _I),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", _P * 10),
        ("view_src", _P),
        ("view_offs", _SIZE),
        ("data", _P),
        ("name", ctypes.c_char * 64),
        ("extra", _P),
        ("padding", ctypes.c_char * 8),
    )


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", _SIZE), ("mem_buffer", _P), ("no_alloc", ctypes.c_bool))


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "ggml_init": (_P, _InitParams),
    "ggml_free": (None, _P),
    "ggml_tensor_overhead": (_SIZE,),
    "ggml_graph_overhead": (_SIZE,),
    "ggml_new_graph": (_P, _P),
    "ggml_build_forward_expand": (None, _P, _P),
    "ggml_new_tensor_2d": (_P, _P, _I, _I64, _I64),
    "ggml_set_name": (_P, _P, ctypes.c_char_p),
    "ggml_mul_mat": (_P, _P, _P, _P),
    "ggml_get_rows": (_P, _P, _P, _P),
    "ggml_nbytes": (_SIZE, _P),
    "ggml_row_size": (_SIZE, _I, _I64),
    "ggml_quantize_init": (None, _I),
    "ggml_quantize_chunk": (_SIZE, _I, _P, _P, _I64, _I64, _I64, _P),
    "ggml_backend_init_by_type": (_P, _I, ctypes.c_char_p),
    "ggml_backend_dev_by_type": (_P, _I),
    "ggml_backend_dev_backend_reg": (_P, _P),
    "ggml_backend_dev_count": (_SIZE,),
    "ggml_backend_dev_description": (ctypes.c_char_p, _P),
    "ggml_backend_dev_get": (_P, _SIZE),
    "ggml_backend_dev_name": (ctypes.c_char_p, _P),
    "ggml_backend_dev_type": (_I, _P),
    "ggml_backend_reg_name": (ctypes.c_char_p, _P),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, _P, _P),
    "ggml_backend_reg_get_proc_address": (_P, _P, ctypes.c_char_p),
    "ggml_backend_graph_compute": (_I, _P, _P),
    "ggml_backend_free": (None, _P),
    "ggml_backend_tensor_get": (None, _P, _P, _SIZE, _SIZE),
    "ggml_backend_tensor_set": (None, _P, _P, _SIZE, _SIZE),
    "ggml_backend_buft_name": (ctypes.c_char_p, _P),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_P, _P, _P),
    "ggml_backend_buffer_free": (None, _P),
}


class Ggml:
    """The library's functions as attributes without their `ggml_` prefix, typed for ctypes."""

    def __init__(self, libraries: list[ctypes.CDLL]) -> None:
        """Look the functions up in `libraries`; raises RuntimeFailedError where one is missing or tensors differ."""
        for name, (result, *arguments) in _SIGNATURES.items():
            function = next((getattr(lib, name) for lib in libraries if hasattr(lib, name)), None)
            if function is None:
                raise RuntimeFailedError(_unknown_build(f"has no {name}"))
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self._check_layout()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)  # only for the type checker: the functions are set in __init__

    def context(self, tensors: int) -> int:
        """A context for the descriptions (not the data) of so many tensors and one graph; free it with `free`."""
        size = tensors * self.tensor_overhead() + self.graph_overhead()
        context: int = self.init(_InitParams(size, None, True))
        return context

    def cpu_backend(self, threads: int) -> int:
        """A CPU backend that computes graphs on `threads` threads; free it with `backend_free`."""
        backend: int = self.backend_init_by_type(CPU_DEVICE, None)
        set_threads = self.cpu_function(b"ggml_backend_set_n_threads", None, _P, _I)
        if not backend or set_threads is None:
            raise RuntimeFailedError(_unknown_build("has no CPU backend"))
        set_threads(backend, threads)
        return backend

    def cpu_function(self, name: bytes, result: Any, *arguments: Any) -> Any:
        """A function that the CPU backend publishes by name, or None."""
        registry = self.backend_dev_backend_reg(self.backend_dev_by_type(CPU_DEVICE))
        address = self.backend_reg_get_proc_address(registry, name)
        return ctypes.CFUNCTYPE(result, *arguments)(address) if address else None

    def _check_layout(self) -> None:
        context = self.context(4)
        a = self.new_tensor_2d(context, TYPE_F32, 3, 5)
        ids = self.new_tensor_2d(context, TYPE_I32, 2, 1)
        rows = GgmlTensor.from_address(self.get_rows(context, a, ids))
        first = GgmlTensor.from_address(a)
        self.set_name(a, b"layout")
        right = (
            self.tensor_overhead() == ctypes.sizeof(GgmlTensor) + 32  # an object header goes before each tensor
            and (first.type, *first.ne, first.nb[1], first.name) == (TYPE_F32, 3, 5, 1, 1, 12, b"layout")
            and (rows.src[0], rows.src[1], *rows.ne[:2], rows.data) == (a, ids, 3, 2, None)
        )
        self.free(context)
        if not right:
            raise RuntimeFailedError(_unknown_build("describes tensors in another way"))


@lru_cache(maxsize=1)
def load_ggml(llama: Path) -> Ggml:
    """The ggml that the library at path `llama` (libllama) runs on; raises RuntimeFailedError where it differs."""
    # Through libllama's handle, because the package ships each library as several copies: loading libggml by
    # path would give a second ggml with its own tables. Windows searches no dependencies, but loads by name once.
    names = ("ggml-base.dll", "ggml.dll", "ggml-cpu.dll") if sys.platform == "win32" else ()
    beside = [ctypes.CDLL(str(llama.parent / name)) for name in names if (llama.parent / name).exists()]
    return Ggml([ctypes.CDLL(str(llama)), *beside])


def _unknown_build(what: str) -> str:
    return (
        f"the installed llama-cpp-python {what}: pip install 'llama-cpp-python==0.3.36' is the version "
        "that vlmedge was developed with"
    )
