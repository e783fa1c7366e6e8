"""How this program opens a graph in ONNX Runtime: execution provider, threads, and the options that always hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from vlmedge.errors import BundleError, RuntimeFailedError
from vlmedge.runtimes.ort_errors import loading
from vlmedge.runtimes.ort_placement import RECORD, placement
from vlmedge.runtimes.ort_saturation import saturates
from vlmedge.runtimes.ort_units import CPU, short

InferenceSession: TypeAlias = Any  # onnxruntime has no types
# Of CUDA's provider: 0 keeps float32 products float32, where its own default rounds them to TF32's 10 bits
# (onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html#use_tf32).
_SETTINGS = {"CUDAExecutionProvider": {"use_tf32": "0"}}


@dataclass(frozen=True, slots=True)
class Engine:
    """An execution provider (ONNX Runtime's own name) and the number of threads that compute.

    `on_cpu`: for each file that was opened with another provider than the CPU's, the operators that ONNX Runtime
    left to the CPU all the same, in words; graphs about shapes are usual there.
    """

    provider: str
    threads: int
    on_cpu: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def unit(self) -> str:
        """The short name of what computes."""
        return short(self.provider)

    def open(
        self, path: Path, *, spinning: bool = False, prepack: bool = True, saved_to: Path | None = None
    ) -> InferenceSession:
        """Open the graph of one file.

        `spinning`: its threads wait busily between operators, which pays for the one session that decodes and costs
        where several take turns. `prepack`: False only to try a file that is not to be computed with: matrices keep
        their file's layout, loading takes no memory, computing is 50 times slower. `saved_to`: write the graph with
        its matrices in this processor's layout there too. Raises BundleError for a file that is missing or damaged,
        RuntimeFailedError where another provider than the chosen one would run it, or most of it.
        """
        import onnxruntime

        if not path.is_file():
            raise BundleError(f"{path} is missing; export it again")
        chosen = (self.provider, _SETTINGS.get(self.provider, {}))
        providers = [self.provider] if self.provider == CPU else [chosen, CPU]
        with loading(path):
            session = onnxruntime.InferenceSession(
                path, self._options(spinning, prepack, saved_to), providers, enable_fallback=False
            )
            session.disable_fallback()
        opened = session.get_providers()
        if opened[0] != self.provider:
            raise RuntimeFailedError(f"{path} was to run on {self.provider}; ONNX Runtime offers {', '.join(opened)}")
        if self.provider != CPU:
            self._note_placement(session, path)
        return session

    def _note_placement(self, session: InferenceSession, path: Path) -> None:
        placed = placement(session, self.provider)
        placed.check(path, self.unit)
        if placed.cpu:
            self.on_cpu[path.name] = str(placed)

    def _options(self, spinning: bool, prepack: bool, saved_to: Path | None) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what it logs as an error it raises too
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        # The names of options: onnxruntime_session_options_config_keys.h
        entries = {
            "session.intra_op.allow_spinning": str(int(spinning)),
            "session.disable_prepacking": str(int(not prepack)),
            "session.x64quantprecision": str(int(saturates())),
            "session.qdq_matmulnbits_accuracy_level": "4",  # of the product it makes of DequantizeLinear and MatMul
        }
        if self.provider != CPU:
            entries |= [RECORD]
        if saved_to is not None:
            options.optimized_model_filepath = str(saved_to)
            entries |= {
                "session.optimized_model_external_initializers_file_name": f"{saved_to.name}_data",
                "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
                "session.save_external_prepacked_constant_initializers": "1",
            }
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        return options
