"""Numbers as people read them."""

from __future__ import annotations

import math

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
SAME = 0.005
"""Ratios this close to 1 are called the same."""


def significant(value: float, digits: int = 3) -> str:
    """`value` to a few significant digits, without an exponent."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def scientific(value: float) -> str:
    """Small and large numbers as 1.3 × 10⁻⁴, others as they are."""
    if not math.isfinite(value) or value == 0 or 1e-2 <= abs(value) < 1e4:
        return significant(value)
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(SUPERSCRIPTS)}"


def scaled(value: float, units: list[str]) -> str:
    """`value` in the largest of `units`, each a thousand of the one before, that leaves it at least 1."""
    steps = 0
    while abs(value) >= 999.5 and steps < len(units) - 1:
        value, steps = value / 1000, steps + 1
    text = f"{value:.0f}" if steps == 0 else significant(value)
    return f"{text} {units[steps]}".strip()


def byte_size(value: float) -> str:
    """Bytes in decimal units: 1 MB is 1 000 000 bytes."""
    return scaled(value, ["B", "kB", "MB", "GB", "TB"])


def quantity(value: float) -> str:
    """A count, such as 26.4 million."""
    return scaled(value, ["", "thousand", "million", "billion", "trillion"])


def milliseconds(value: float) -> str:
    """A time, in seconds from one second on."""
    return f"{significant(value)} ms" if value < 1000 else f"{significant(value / 1000)} s"


def decibels(value: float, digits: int = 1) -> str:
    """A PSNR; 100 dB is what equal pictures are given."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "not finite"


def change(ratio: float, less: str, more: str) -> tuple[str, str]:
    """A ratio candidate / reference as a factor and the direction: 0.25 is `4.00×` and `less`."""
    if not math.isfinite(ratio) or ratio <= 0:
        return "—", "not known"
    if abs(ratio - 1) <= SAME:
        return "1×", "the same"
    return f"{significant(1 / ratio if ratio < 1 else ratio)}×", less if ratio < 1 else more
