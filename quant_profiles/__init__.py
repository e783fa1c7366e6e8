"""Quantization profiles: declarative rules that give every tensor a scheme."""

from __future__ import annotations

from vlmedge.quant_profiles.plan import hints, plan, prefill_plan
from vlmedge.quant_profiles.profile import (
    KvCache,
    LayerSelector,
    QuantProfile,
    QuantRule,
    Scheme,
    load_profile,
    profile_names,
    profiles_for,
)

__all__ = [
    "KvCache",
    "LayerSelector",
    "QuantProfile",
    "QuantRule",
    "Scheme",
    "hints",
    "load_profile",
    "plan",
    "prefill_plan",
    "profile_names",
    "profiles_for",
]
