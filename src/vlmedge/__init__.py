"""vlmedge: small vision-language models from a PyTorch checkpoint to a phone, a board, a laptop or a browser.

`export(source, format, profile)` makes a bundle, `load(bundle or checkpoint)` opens a model with its skills
(`query`, `caption`, `detect`, `point`, `gaze`, `chat`), `plan` tells what an export would write. `verify` compares a
bundle with its checkpoint stage by stage, `selftest` with its own recorded vectors; `evaluate` counts right answers of
several models side by side, `bench` measures what they cost.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

from vlmedge.errors import VlmedgeError

if TYPE_CHECKING:
    from vlmedge.answer import Answer, Box, Point
    from vlmedge.bundle import Bundle, open_bundle
    from vlmedge.device_bench.bench import bench
    from vlmedge.evaluation.evaluate import evaluate
    from vlmedge.loading import load
    from vlmedge.parity.selftest import selftest
    from vlmedge.parity.verify import verify
    from vlmedge.pipeline import Plan, export, plan
    from vlmedge.skills import Model

__version__ = "0.1.0"

# onnxruntime 1.32 reports home from its import on, and keeps a device id on disk; whoever wants that says so.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_LAZY = {
    "Answer": "vlmedge.answer",
    "Box": "vlmedge.answer",
    "Bundle": "vlmedge.bundle",
    "Model": "vlmedge.skills",
    "Plan": "vlmedge.pipeline",
    "Point": "vlmedge.answer",
    "bench": "vlmedge.device_bench.bench",
    "evaluate": "vlmedge.evaluation.evaluate",
    "export": "vlmedge.pipeline",
    "load": "vlmedge.loading",
    "open_bundle": "vlmedge.bundle",
    "plan": "vlmedge.pipeline",
    "selftest": "vlmedge.parity.selftest",
    "verify": "vlmedge.parity.verify",
}

__all__ = [
    "Answer",
    "Box",
    "Bundle",
    "Model",
    "Plan",
    "Point",
    "VlmedgeError",
    "bench",
    "evaluate",
    "export",
    "load",
    "open_bundle",
    "plan",
    "selftest",
    "verify",
]


def __getattr__(name: str) -> object:
    """Import a public name on first use, so that `import vlmedge` stays fast."""
    if name not in _LAZY:
        raise AttributeError(f"module 'vlmedge' has no attribute '{name}'")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
