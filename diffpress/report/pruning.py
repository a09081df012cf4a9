"""What was removed as a figure and in words: a row for each structure, its units from the first to the last."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from diffpress.compress.options import Removable
from diffpress.export.manifest import PlanRow

from .figures import Measure

KINDS: tuple[str, ...] = get_args(Removable)
NAMED = 30
"""Most structures, or groups of structures, that are named beside the figure."""
TALLEST, SHORTEST, FIGURE = 22, 3, 480
"""Pixels of a structure where there are few of them, where there are many, and about of all where there are more than a few."""
WIDTH = 1000
"""Of the figure, in units of its own."""
RUN = re.compile(r"(\d+)(?:-(\d+))?")
"""Neighbouring units in the reason of a row, such as `1, 4-7 removed`."""


@dataclass(frozen=True)
class Structure:
    """One row."""

    name: str
    kind: str
    kept: int
    count: int
    removed: str
    """Which units, in words."""
    path: str
    """What is kept of it, as SVG path data in a row of height one."""

    @property
    def words(self) -> str:
        return f"{self.name}: {self.kept} of {self.count} {self.kind} kept"


@dataclass(frozen=True)
class Pruning:
    """What the page shows of what was removed."""

    words: str
    structures: list[Structure]
    kinds: list[str]
    height: int
    """Of the figure, in pixels."""
    line: int | None
    """Height of a name, in pixels, where each structure has one."""
    names: list[tuple[str, int]]
    """Of the first of so many structures, beside them."""
    facts: list[tuple[str, str]]


def is_structure(row: PlanRow) -> bool:
    """Whether a row of the plan is of units, rather than of what has weights."""
    return row.format in KINDS


def removed_words(plan: Sequence[PlanRow]) -> str:
    """Such as `3 of 16 heads and 40 of 512 neurons removed`; nothing where nothing could be."""
    parts = [f"{count - kept} of {count} {kind}" for kind, (kept, count) in _sums(plan).items()]
    *most, last = parts or [""]
    return (f"{', '.join(most)} and {last}" if most else last) + (" removed" if parts else "")


def pruning(plan: Sequence[PlanRow], measured: Mapping[str, Measure]) -> Pruning | None:
    """What was removed, and what that spares. None where nothing was looked at for that."""
    structures = [_structure(row) for row in plan if is_structure(row)]
    if not structures:
        return None
    count = len(structures)
    height = min(TALLEST, max(SHORTEST, FIGURE // count))
    every = math.ceil(count / NAMED)
    return Pruning(
        words=removed_words(plan),
        structures=structures,
        kinds=list(_sums(plan)),
        height=height * count,
        line=height if count <= NAMED else None,
        names=[(structures[i].name, len(structures[i : i + every])) for i in range(0, count, every)],
        facts=[
            *((f"{kind.capitalize()} kept", f"{kept:,} of {all_:,}") for kind, (kept, all_) in _sums(plan).items()),
            *(
                (own.label, f"{own.reference} → {own.candidate}")
                for key, own in measured.items()
                if key in ("parameters", "macs_per_image")
            ),
        ],
    )


def _sums(plan: Sequence[PlanRow]) -> dict[str, tuple[int, int]]:
    """Of each kind that there is, how many units are kept, and of how many."""
    shapes = {kind: [row.shape for row in plan if row.format == kind] for kind in KINDS}
    return {kind: (sum(own[0] for own in of), sum(own[1] for own in of)) for kind, of in shapes.items() if of}


def _structure(row: PlanRow) -> Structure:
    kept, count = row.shape
    runs = [(int(first), int(last or first)) for first, last in RUN.findall(row.reason)]
    words = row.reason.removesuffix(" removed") if kept < count else ""
    return Structure(row.module.rpartition(", ")[0], row.format, kept, count, words, _path(runs, count))


def _path(gone: Sequence[tuple[int, int]], count: int) -> str:
    """What is between the runs that are gone."""
    edges = [0, *(edge for first, last in gone for edge in (first, last + 1)), count]
    pairs = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b > a]
    return "".join(f"M{WIDTH * a / count:.4g} 0H{WIDTH * b / count:.4g}V1H{WIDTH * a / count:.4g}z" for a, b in pairs)
