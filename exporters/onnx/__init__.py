"""The ONNX format: graphs built block by block, weights streamed beside them."""

from __future__ import annotations

from vlmedge.exporters.onnx.exporter import EXPORTER

__all__ = ["EXPORTER"]
