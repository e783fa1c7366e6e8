"""Numbers as a reader wants them: three digits, units that fit, words for what is no number."""

from __future__ import annotations

import math

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float | None) -> str:
    """Three significant digits: 0.0123, 1.23e-6, 12,300; a dash for None, "not a number", "infinite"."""
    if value is None:
        return "\u2013"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite" if value > 0 else "minus infinite"
    if value == round(value) and abs(value) < 1e6:
        return f"{value + 0.0:,.0f}"  # -0.0 + 0.0 is 0.0
    if 1e-3 <= abs(value) < 1e6:
        return f"{float(f'{value:.3g}'):,}".removesuffix(".0")
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def share(value: float) -> str:
    """A share of 1 in percent: 99.2 %; 100 % only where it is all."""
    if not math.isfinite(value):
        return number(value)
    percent = f"{100 * value:.1f}".removesuffix(".0")
    return f"{'99.9' if percent == '100' and value < 1 else percent} %"


def size(count: int) -> str:
    """Bytes in units of 10^3: 812 bytes, 4.1 kB, 2.35 GB."""
    value, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def power(exponent: int) -> str:
    """A power of ten as an axis names it: 10⁻⁶; 1 for the zeroth."""
    return "1" if exponent == 0 else f"10{str(exponent).translate(_SUPERSCRIPT)}"
