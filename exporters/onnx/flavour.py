"""The two ways in which the graphs can be written, and what each keeps keys and values in."""

from __future__ import annotations

from typing import Literal

from vlmedge.quant_profiles import KvCache

Flavour = Literal["ort", "portable"]
FLAVOURS: tuple[Flavour, ...] = ("ort", "portable")


def flavour_of(name: str) -> Flavour:
    """A flavour by its name; "" is the default."""
    return "portable" if name == "portable" else "ort"


def kv_type(wanted: KvCache, flavour: Flavour) -> Literal["f32", "int8"]:
    """Keys and values are f32, or int8 where that is wanted and the flavour has an operator for it."""
    return "int8" if wanted == "int8" and flavour == "ort" else "f32"
