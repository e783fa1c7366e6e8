"""The table of formats, and what an exporter is given and gives back."""

from __future__ import annotations

from vlmedge.exporters.base import MAX_PART, Encoding, Exporter, ExportJob, Grain, Order, Readback, Written
from vlmedge.registry import Registry

EXPORTERS: Registry[Exporter] = Registry(
    "format",
    {
        "gguf": "vlmedge.exporters.gguf:EXPORTER",
        "onnx": "vlmedge.exporters.onnx:EXPORTER",
    },
)

__all__ = [
    "EXPORTERS",
    "MAX_PART",
    "Encoding",
    "ExportJob",
    "Exporter",
    "Grain",
    "Order",
    "Readback",
    "Written",
]
