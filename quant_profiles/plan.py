"""A profile applied to a model: one scheme per tensor, computed before any weight is read.

Precedence, first hit wins:
1. `KEPT`: vectors and small tables, which stay f32 whatever the profile says;
2. the profile's rules in the order of its file; a rule with `layers` holds in the selected layers only.
A tensor that no rule matches is an error: end a profile with `match = "*"`.

The rules under `prefill` give schemes to a second copy of the matrices in the decoder's layers, the first hit again;
a matrix that none of them matches has no second copy.

A rule that matches nothing in this model is an error where no model has such a tensor (it is misspelt), and a hint
where another model has (a rule for gated MLPs, the region heads of a model without them).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from vlmedge.errors import UsageError
from vlmedge.quant_profiles.profile import QuantProfile, QuantRule, Scheme
from vlmedge.spec import DecoderSpec, MlpProjector, ModelSpec, RegionSpec, Shape, VisionSpec

F32 = Scheme("float", 32)


@dataclass(frozen=True, slots=True)
class Kept:
    """Tensors that stay f32, and why."""

    match: str
    why: str


KEPT = (
    Kept("vision.position", "added to every patch; 3 MB of gigabytes, and runtimes add it in f32"),
    Kept("region.*_features", "frequencies of Fourier features: an error becomes a phase"),
)
VECTORS = "a norm or a bias: no bytes to win, and every value carries weight"


def kept(name: str, shape: Shape) -> str:
    """Why a tensor stays f32 under every profile, or "" where the profile decides."""
    if len(shape) < 2:
        return VECTORS
    return next((rule.why for rule in KEPT if fnmatchcase(name, rule.match)), "")


def plan(profile: QuantProfile, spec: ModelSpec) -> dict[str, Scheme]:
    """Give every tensor of the model its scheme, in the order of `spec.tensors()`.

    Raises UsageError for a rule that no model's tensors match, and for a tensor that no rule matches.
    """
    shapes = spec.tensors()
    _check_rules(_Rules.of(profile), list(shapes))
    winners = _winners(profile.rules, shapes)
    for name, rule in winners.items():
        if rule is None and not kept(name, shapes[name]):
            raise UsageError(f'profile {profile.name} has no rule for {name}; end it with a rule that has match = "*"')
    return {name: F32 if rule is None else rule.scheme for name, rule in winners.items()}


def prefill_plan(profile: QuantProfile, spec: ModelSpec) -> dict[str, Scheme]:
    """Give the second copy's tensors their schemes, in the order of `spec.tensors()`; {} where the profile has none.

    Raises UsageError for a rule that matches no tensor of any model's decoder layers.
    """
    shapes = spec.tensors()
    _check_rules(_Rules.of(profile, prefill=True), [name for name in shapes if _copied(name)])
    winners = _winners(profile.prefill, shapes)
    return {name: rule.scheme for name, rule in winners.items() if rule is not None and _copied(name)}


def hints(profile: QuantProfile, spec: ModelSpec) -> tuple[str, ...]:
    """One line for each rule that decides nothing in this model, though it is not misspelt."""
    shapes = spec.tensors()
    copied = {name: shape for name, shape in shapes.items() if _copied(name)}
    return (*_idle(_Rules.of(profile), shapes), *_idle(_Rules.of(profile, prefill=True), copied))


def vocabulary(layers: int) -> Iterator[str]:
    """Every canonical name that some model of up to `layers` layers can have."""
    vision = VisionSpec(
        layers, width=1, heads=1, mlp_width=1, image_size=1, patch_size=1, activation="gelu", norm_eps=0, post_norm=True
    )
    decoder = DecoderSpec(
        layers, width=1, heads=1, kv_heads=1, head_dim=1, mlp_width=1, vocab=1, context=1, norm="layer", norm_eps=0,
        activation="gelu", gated=True, parallel_residual=False, rope_dims=0, rope_theta=0, bias=True, head_bias=True,
        tied_head=False, bidirectional_prefix=False,
    )  # fmt: skip
    yield from vision.tensors()
    yield from MlpProjector(1, "gelu", joins_global=True).tensors(vision, 1)
    yield from decoder.tensors()
    yield from RegionSpec(2, 1, 2, 1, hidden=1, activation="gelu", size_scale="log2").tensors(1)


@dataclass(frozen=True, slots=True)
class _Rules:
    """One list of rules of a profile, with the words for it in messages."""

    title: str
    whose: str
    rules: tuple[QuantRule, ...]
    prefill: bool

    @classmethod
    def of(cls, profile: QuantProfile, *, prefill: bool = False) -> _Rules:
        """The profile's rules, or those of its copy for prefill."""
        if prefill:
            return cls(f"profile {profile.name}: prefill rule", "any model's decoder layers", profile.prefill, True)
        return cls(f"profile {profile.name}: rule", "any model", profile.rules, False)


def _copied(name: str) -> bool:
    """Is it a tensor that a copy for prefill has, where the rules say so?"""
    return name.startswith("decoder.layers.")


def _winners(rules: tuple[QuantRule, ...], shapes: dict[str, Shape]) -> dict[str, QuantRule | None]:
    layers = _layer_counts(shapes)
    return {
        name: None
        if kept(name, shape)
        else next((rule for rule in rules if rule.matches(name, *_place(name, layers))), None)
        for name, shape in shapes.items()
    }


def _idle(given: _Rules, shapes: dict[str, Shape]) -> Iterator[str]:
    """A line for each rule that decides nothing, with the reason."""
    used = {id(rule) for rule in _winners(given.rules, shapes).values()}
    layers = _layer_counts(shapes)
    for number, rule in enumerate(given.rules, 1):
        if id(rule) in used:
            continue
        if not any(fnmatchcase(name, rule.match) for name in shapes):
            reason = "this model has no such tensor"
        elif not any(rule.matches(name, *_place(name, layers)) for name in shapes):
            reason = "its layers select none of this model's"
        else:
            reason = "earlier rules take what it matches"
        yield f"{given.title} {number} ({rule.match!r}) decides nothing: {reason}"


def _check_rules(given: _Rules, names: list[str]) -> None:
    for number, rule in enumerate(given.rules, 1):
        if any(fnmatchcase(name, rule.match) for name in names):
            continue
        known = [name for name in vocabulary(128) if _copied(name) or not given.prefill]
        if not any(fnmatchcase(name, rule.match) for name in known):
            raise UsageError(
                f"{given.title} {number} matches no tensor of {given.whose}: {rule.match!r}"
                f"{_nearest_pattern(rule.match, known)}"
            )


def _nearest_pattern(pattern: str, names: Iterable[str]) -> str:
    """Return the nearest canonical name, its layer number as `*`, in the words of `errors.nearest`."""
    patterns = {re.sub(r"\.\d+\.", ".*.", name) for name in names}
    close = difflib.get_close_matches(pattern, sorted(patterns), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else "; vlmedge plan lists the names"


def _layer_counts(names: Iterable[str]) -> dict[str, int]:
    """Component -> number of its layers."""
    counts: dict[str, int] = {}
    for name in names:
        found = re.match(r"(\w+)\.layers\.(\d+)\.", name)
        if found:
            counts[found[1]] = max(counts.get(found[1], 0), int(found[2]) + 1)
    return counts


def _place(name: str, counts: dict[str, int]) -> tuple[int | None, int]:
    """The layer of a tensor (None: in none) and the number of layers of its component."""
    found = re.match(r"(\w+)\.layers\.(\d+)\.", name)
    return (int(found[2]), counts[found[1]]) if found else (None, 0)
