"""GGUF: text.gguf and mmproj.gguf, which stock llama.cpp loads, and heads.gguf for what it has no place for."""

from __future__ import annotations

from vlmedge.exporters.gguf.exporter import EXPORTER

__all__ = ["EXPORTER"]
