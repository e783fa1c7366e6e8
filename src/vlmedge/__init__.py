"""vlmedge: small vision-language models from a PyTorch checkpoint to a phone, a board, a laptop or a browser.

`export(source, format, profile)` makes a bundle, `load(bundle or checkpoint)` opens a model with its skills
(`query`, `caption`, `detect`, `point`, `gaze`, `chat`), `plan` tells what an export would write.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

from vlmedge.errors import VlmedgeError

if TYPE_CHECKING:
    from vlmedge.answer import Answer, Box, Point
    from vlmedge.bundle import Bundle, open_bundle
    from vlmedge.loading import load
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
    "export": "vlmedge.pipeline",
    "load": "vlmedge.loading",
    "open_bundle": "vlmedge.bundle",
    "plan": "vlmedge.pipeline",
}

__all__ = [
    "Answer",
    "Box",
    "Bundle",
    "Model",
    "Plan",
    "Point",
    "VlmedgeError",
    "export",
    "load",
    "open_bundle",
    "plan",
]


def __getattr__(name: str) -> object:
    """Import a public name on first use, so that `import vlmedge` stays fast."""
    if name not in _LAZY:
        raise AttributeError(f"module 'vlmedge' has no attribute '{name}'")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
