"""Quantization profiles: declarative rules that give every tensor a scheme."""

from __future__ import annotations

from vlmedge.quant_profiles.plan import hints, plan
from vlmedge.quant_profiles.profile import LayerSelector, QuantProfile, QuantRule, Scheme, load_profile, profile_names

__all__ = [
    "LayerSelector",
    "QuantProfile",
    "QuantRule",
    "Scheme",
    "hints",
    "load_profile",
    "plan",
    "profile_names",
]
