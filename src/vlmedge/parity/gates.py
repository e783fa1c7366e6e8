"""Which limits an export is judged by: its profile's, the manifest's, or wide ones where neither has any."""

from __future__ import annotations

from vlmedge.bundle import Manifest
from vlmedge.limits import Against, Limits
from vlmedge.quant_profiles import load_profile, profile_names

# For profiles of the user's own that say nothing: what no export that is of any use exceeds.
DEFAULT = {
    "stored": Limits("stored", "The profile has no limits; these are wide.", 0.1, 0.1, 0.35, 0.1),
    "original": Limits("original", "The profile has no limits; these are wide.", 0.5, 0.5, 0.95, 0.5),
}


def limits_for(manifest: Manifest, against: Against) -> Limits:
    """The limits of a comparison.

    Those of the installed profile come first where it has the bundle's name and rules: a manifest is a file that
    anybody can edit. What may differ from the original may differ from the stored weights too.
    """
    found = {limits.against: limits for limits in _known(manifest)}
    return found.get(against) or (found.get("original") if against == "stored" else None) or DEFAULT[against]


def own_limits(manifest: Manifest) -> bool:
    """Are the limits that judge a bundle those of its manifest?"""
    return _known(manifest) == manifest.profile.limits


def _known(manifest: Manifest) -> tuple[Limits, ...]:
    entry = manifest.profile
    if entry.name in profile_names():
        profile = load_profile(entry.name)
        if profile.digest == entry.digest:
            return profile.limits_for(manifest.format)
    return entry.limits
