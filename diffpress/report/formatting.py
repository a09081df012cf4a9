"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

TIMES = "\N{MULTIPLICATION SIGN}"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
IDENTICAL_DB = 100
"""PSNR that equal images are given."""
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
    """Small and large numbers with a power of ten, others as they are."""
    if not math.isfinite(value) or value == 0 or 1e-2 <= abs(value) < 1e4:
        return significant(value)
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} {TIMES} 10{str(int(exponent)).translate(SUPERSCRIPTS)}"


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
    """A time, in seconds from ten seconds on."""
    return f"{significant(value)} ms" if value < 1e4 else f"{significant(value / 1000)} s"


def decibels(value: float) -> str:
    """A PSNR to a tenth of a decibel."""
    return f"{value:.1f}" if math.isfinite(value) else "not finite"


def change(ratio: float, less: str, more: str) -> tuple[str, str]:
    """A ratio candidate / reference as a factor and the direction: 0.25 is 4.00 times and `less`."""
    if not math.isfinite(ratio) or ratio <= 0:
        return "—", "not known"
    if abs(ratio - 1) <= SAME:
        return f"1{TIMES}", "the same"
    return f"{significant(1 / ratio if ratio < 1 else ratio)}{TIMES}", less if ratio < 1 else more


def ranges(places: Iterable[int]) -> str:
    """Rising `places`, those that follow each other together: 1, 3, 6-8."""
    runs = [[place for _, place in run] for _, run in groupby(enumerate(places), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def measured_words(metrics: Mapping[str, Any]) -> list[str]:
    """What there is to know of how it was compared, beside the figures."""
    measured, drawn = metrics.get("measured_on", "images"), metrics.get("drawn_arguments")
    sentences = [] if measured == "images" else [f"PSNR and SSIM are of {measured}"]
    if drawn:
        sentences.append(
            f"Nothing was given as {' and '.join(drawn)}: drawings of diffpress's own stand for it, so quality on real "
            "pictures may differ. Give some by record.calls or sampling.call"
        )
    return sentences
