"""What became of every module, and which of them the output depends on most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from diffpress.export.manifest import PlanRow

from .words import byte_size, scientific

MOST_SENSITIVE = 20
FORMAT_COLOURS = 6
"""Colours that the style sheet has for formats; later formats share the last."""


@dataclass(frozen=True)
class Total:
    """All modules of one format."""

    format: str
    colour: int
    modules: int
    before: int
    after: int


@dataclass(frozen=True)
class SensitivityBar:
    """One layer; `width` in percent of the largest error."""

    name: str
    format: str
    colour: int
    width: float
    text: str


def packed(row: PlanRow) -> bool:
    """Whether the module is stored in a format such as W4A8 rather than left in its dtype."""
    return row.format.startswith("W")


def totals(plan: Sequence[PlanRow]) -> list[Total]:
    """One entry a format, packed formats first."""
    formats = sorted({row.format for row in plan}, key=lambda name: (not name.startswith("W"), name))
    return [_total(name, place, [row for row in plan if row.format == name]) for place, name in enumerate(formats)]


def summary(plan: Sequence[PlanRow]) -> str:
    """What was done, in words: `W8A8, 84 of 97 layers`."""
    done = [total for total in totals(plan) if total.format.startswith("W")]
    if not done:
        return f"nothing packed, {len(plan)} layers left as they were"
    if len(done) == 1:
        return f"{done[0].format}, {done[0].modules} of {len(plan)} layers"
    parts = sorted(done, key=lambda total: -total.modules)
    return " and ".join(f"{total.format} in {total.modules}" for total in parts) + f" of {len(plan)} layers"


def sensitivity(plan: Sequence[PlanRow]) -> list[SensitivityBar]:
    """The layers whose rounding alone changes the denoiser's output most, the largest first."""
    known = [(row, row.error) for row in plan if row.error is not None]
    known.sort(key=lambda pair: -pair[1] if math.isfinite(pair[1]) else -math.inf)
    worst = known[:MOST_SENSITIVE]
    largest = max((error for _, error in worst if math.isfinite(error)), default=0.0)
    colours = {total.format: total.colour for total in totals(plan)}
    return [
        SensitivityBar(row.module, row.format, colours[row.format], _share(error, largest), scientific(error))
        for row, error in worst
    ]


def shape_words(row: PlanRow) -> str:
    """Such as 320 × 320 × 3 × 3."""
    return " × ".join(map(str, row.shape)) or "scalar"


def error_words(row: PlanRow) -> str:
    """The sensitivity of one row, empty where it was not measured."""
    return "" if row.error is None else scientific(row.error)


def saving(before: int, after: int) -> str:
    """Bytes before and after as a ratio."""
    return f"{after / before:.3f}" if before else "—"


def whole(parts: Sequence[Total]) -> Total:
    """The sum over all formats."""
    return Total(
        "all",
        0,
        sum(part.modules for part in parts),
        sum(part.before for part in parts),
        sum(part.after for part in parts),
    )


def _total(name: str, place: int, rows: Sequence[PlanRow]) -> Total:
    colour = min(place, FORMAT_COLOURS - 1)
    return Total(name, colour, len(rows), sum(row.source_bytes for row in rows), sum(row.bytes for row in rows))


def _share(error: float, largest: float) -> float:
    if not math.isfinite(error):
        return 100.0
    return 100 * error / largest if largest > 0 else 0.0


FILTERS = {"shape": shape_words, "error": error_words, "bytes": byte_size}
"""How the template writes a row."""
