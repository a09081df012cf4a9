"""What became of every module, and which of them the output depends on most."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from diffpress.export.manifest import PlanRow
from diffpress.export.runtime import Expansion

from .formatting import TIMES, byte_size, scientific
from .pruning import is_structure, removed_words

MOST_SENSITIVE = 20
ATTENTION = "attention "
"""How the format of an attention begins, which is no layer."""
STEP_PLAN = "step plan"
"""How that of a step plan does."""
PACKED = re.compile(rf"W\d+(A\d+| g\d+)?|FP8|{ATTENTION}.*int8|{STEP_PLAN}.*")
"""Formats that an edit gives; all others are dtypes."""
PACKED_COLOURS = 5
PLAIN_COLOURS = 2
"""Colours that the style sheet has for packed formats and, after them, greys for dtypes; later ones share the last."""


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


@dataclass(frozen=True)
class Line:
    """One row of the plan as the page shows it."""

    component: str
    module: str
    shape: str
    format: str
    colour: int
    before: str
    after: str
    reason: str
    error: str


def packed(format: str) -> bool:
    """Whether a format is one such as W4A8, W4 g64 or FP8, rather than the dtype a module was left in."""
    return PACKED.fullmatch(format) is not None


def totals(plan: Sequence[PlanRow]) -> list[Total]:
    """One entry a format: packed formats first, and of both kinds the most common first."""
    return [
        _total(name, colour, [row for row in plan if row.format == name]) for name, colour in _colours(plan).items()
    ]


def summary(plan: Sequence[PlanRow]) -> str:
    """What was done, in words: `3 of 16 heads removed; W8A8, 84 of 97 layers; attention int8, 8 of 8 attentions`, and what a
    step plan saves.
    """
    layers = [row for row in plan if not row.format.startswith((ATTENTION, STEP_PLAN)) and not is_structure(row)]
    attentions = [row for row in plan if row.format.startswith(ATTENTION)]
    removed = removed_words(plan)
    words = [removed] if removed else []
    left = f"nothing packed{'' if removed else f', {len(layers)} layers left as they were'}"
    words += [_formats(layers, "layers") or left]
    words += [_formats(attentions, "attentions") or "attention in float"] if attentions else []
    words += [row.reason or row.format for row in plan if row.format.startswith(STEP_PLAN)]
    return "; ".join(words)


def _formats(rows: Sequence[PlanRow], noun: str) -> str:
    done = [total for total in totals(rows) if packed(total.format)]
    if len(done) < 2:
        return "".join(f"{total.format}, {total.modules} of {len(rows)} {noun}" for total in done)
    parts = [f"{total.format} in {total.modules}" for total in done]
    return f"{', '.join(parts[:-1])} and {parts[-1]} of {len(rows)} {noun}"


def sensitivity(plan: Sequence[PlanRow]) -> list[SensitivityBar]:
    """The layers whose rounding alone changes the denoiser's output most, the largest first."""
    known = [(row, row.error) for row in plan if row.error is not None and _rounded(row)]
    known.sort(key=lambda pair: -pair[1] if math.isfinite(pair[1]) else -math.inf)
    worst = known[:MOST_SENSITIVE]
    largest = max((error for _, error in worst if math.isfinite(error)), default=0.0)
    colours = _colours(plan)
    return [
        SensitivityBar(row.module, row.format, colours[row.format], _share(error, largest), scientific(error))
        for row, error in worst
    ]


def lines(plan: Sequence[PlanRow]) -> list[Line]:
    """Every row in the order of the plan."""
    colours = _colours(plan)
    return [_line(row, colours[row.format]) for row in plan]


def explained(plan: Sequence[PlanRow], expansion: Expansion) -> list[PlanRow]:
    """The plan, and beside the reasons which layers lose to floats on this machine, and what is done about it."""
    words = [expansion.words(f"{row.component}.{row.module}") for row in plan]
    return [
        row.model_copy(update={"reason": "; ".join(filter(None, (row.reason, own)))})
        for row, own in zip(plan, words, strict=True)
    ]


def saving(part: Total) -> str:
    """Bytes after over bytes before."""
    return f"{part.after / part.before:.3f}" if part.before else "—"


def whole(parts: Sequence[Total]) -> Total:
    """The sum over all formats."""
    return Total(
        "All formats",
        0,
        sum(part.modules for part in parts),
        sum(part.before for part in parts),
        sum(part.after for part in parts),
    )


def _colours(plan: Sequence[PlanRow]) -> dict[str, int]:
    """The number of each format's colour: packed formats first, and of both kinds the most common first."""
    counts = Counter(row.format for row in plan)
    names = sorted(counts, key=lambda name: (-counts[name], name))
    done, left = [name for name in names if packed(name)], [name for name in names if not packed(name)]
    return {name: min(place, PACKED_COLOURS - 1) for place, name in enumerate(done)} | {
        name: PACKED_COLOURS + min(place, PLAIN_COLOURS - 1) for place, name in enumerate(left)
    }


def _total(name: str, colour: int, rows: Sequence[PlanRow]) -> Total:
    return Total(name, colour, len(rows), sum(row.source_bytes for row in rows), sum(row.bytes for row in rows))


def _line(row: PlanRow, colour: int) -> Line:
    return Line(
        row.component,
        row.module,
        f" {TIMES} ".join(map(str, row.shape)) or ("—" if row.format.startswith((ATTENTION, STEP_PLAN)) else "scalar"),
        row.format,
        colour,
        byte_size(row.source_bytes),
        byte_size(row.bytes),
        row.reason,
        "" if row.error is None or not _rounded(row) else scientific(row.error),
    )


def _rounded(row: PlanRow) -> bool:
    """Whether its error is that of rounding it: a step plan's is of whole images."""
    return not row.format.startswith(STEP_PLAN)


def _share(error: float, largest: float) -> float:
    if not math.isfinite(error):
        return 100.0
    return 100 * error / largest if largest > 0 else 0.0
