"""What an export is asked for by name: an exporter, a profile and a flavour, found to fit each other."""

from __future__ import annotations

from dataclasses import dataclass

from vlmedge.errors import UsageError, nearest
from vlmedge.exporters import EXPORTERS, MAX_PART, Exporter, Order
from vlmedge.quant_profiles import QuantProfile, load_profile, plan, prefill_plan, profiles_for
from vlmedge.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Choice:
    """A format's exporter, and the profile and flavour that it shall write."""

    exporter: Exporter
    profile: QuantProfile
    flavour: str

    def order(self, spec: ModelSpec, max_part: int | None = None) -> Order:
        """The choice applied to a model. Raises UsageError as `quant_profiles.plan` does."""
        return Order(
            spec=spec,
            plan=plan(self.profile, spec),
            prefill=prefill_plan(self.profile, spec),
            flavour=self.flavour,
            kv_cache=self.exporter.kv_cache(self.profile.kv_cache, self.flavour),
            max_part=max_part or MAX_PART,
        )


def choose(format: str, profile: str | None = None, flavour: str | None = None) -> Choice:
    """Look the three up; None means the format's default.

    Raises UsageError for a name that is none, and for a profile or flavour that the format does not have.
    """
    exporter = EXPORTERS[format]
    rules = load_profile(profile or exporter.default_profile)
    if rules.formats and format not in rules.formats:
        raise UsageError(
            f"profile {rules.name} is for {', '.join(rules.formats)}, not {format}; "
            f"for {format} there are: {', '.join(profiles_for(format))}"
        )
    for name in rules.formats:
        if name not in EXPORTERS:
            raise UsageError(f"profile {rules.name} names the unknown format '{name}'{nearest(name, EXPORTERS)}")
    return Choice(exporter, rules, _flavour(exporter, flavour))


def _flavour(exporter: Exporter, wanted: str | None) -> str:
    """The flavour's name as the exporter spells it."""
    possible = exporter.flavours
    if wanted is None or wanted in possible:
        return possible[0] if wanted is None else wanted
    if possible == ("",):
        raise UsageError(f"{exporter.format} has no flavours; leave '{wanted}' out")
    raise UsageError(f"{exporter.format} has no flavour '{wanted}'{nearest(wanted, possible)}")
