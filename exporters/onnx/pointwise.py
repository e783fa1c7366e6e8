"""Norms, activations and the two-layer blocks made of them."""

from __future__ import annotations

import math
from typing import assert_never

import numpy as np
import onnx_ir as ir

from vlmedge.exporters.onnx.graph import Graph
from vlmedge.exporters.onnx.linear import linear, vector
from vlmedge.spec import Activation, Norm

_QUICK = 1.702


def norm(g: Graph, x: ir.Value, name: str, kind: Norm, eps: float) -> ir.Value:
    """Normalise the last axis and scale it by `NAME.weight` (and shift it by `NAME.bias`)."""
    weight = vector(g, f"{name}.weight")
    if kind == "layer":
        return g.node("LayerNormalization", x, weight, vector(g, f"{name}.bias"), axis=-1, epsilon=eps)
    if g.flavour == "portable":
        return g.node("RMSNormalization", x, weight, axis=-1, epsilon=eps)
    # ONNX Runtime's own name for it, which it registers in the standard domain.
    return g.node("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=eps, stash_type=1)


def activate(g: Graph, kind: Activation, x: ir.Value) -> ir.Value:
    """Apply an activation by its declared name."""
    if kind == "gelu_tanh":
        return g.contrib("FastGelu", x) if g.flavour == "ort" else g.node("Gelu", x, approximate="tanh")
    if kind == "gelu":
        return g.contrib("Gelu", x) if g.flavour == "ort" else g.node("Gelu", x)
    if kind == "quick_gelu":
        return _sigmoid_gate(g, x, _QUICK)
    if kind == "silu":
        return _sigmoid_gate(g, x, 1.0)
    assert_never(kind)


def mlp(g: Graph, x: ir.Value, name: str, activation: Activation, gated: bool = False) -> ir.Value:
    """`down(activation(up x))`, or with a gate `down(activation(gate x) * up x)`; rows in, rows out."""
    if not gated:
        return linear(g, activate(g, activation, linear(g, x, f"{name}.up")), f"{name}.down")
    opened = activate(g, activation, linear(g, x, f"{name}.gate"))
    return linear(g, g.node("Mul", opened, linear(g, x, f"{name}.up")), f"{name}.down")


def fourier(g: Graph, x: ir.Value, table: str) -> ir.Value:
    """Cos and sin of 2 pi x times the stored frequencies [k, n]: f32 [rows, 2 n]."""
    turns = g.node("MatMul", x, vector(g, table))
    angles = g.node("Mul", turns, g.const(2 * math.pi, np.float32))
    return g.node("Concat", g.node("Cos", angles), g.node("Sin", angles), axis=-1)


def _sigmoid_gate(g: Graph, x: ir.Value, steepness: float) -> ir.Value:
    if g.flavour == "ort":
        return g.contrib("QuickGelu", x, alpha=steepness)
    steep = x if steepness == 1.0 else g.node("Mul", x, g.const(steepness, np.float32))
    return g.node("Mul", x, g.node("Sigmoid", steep))
