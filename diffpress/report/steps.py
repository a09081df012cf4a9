"""A step plan as a figure and in words, and the trials that it was chosen from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from diffpress.export.edits import step_plans
from diffpress.export.manifest import Manifest
from diffpress.export.runtime.step_plan import COMPUTED, INHERITED, UNUSED, StepPlan, Unit

from .charts import LABELS, Histogram, Strip, Tick, close_axis, histogram, step_words
from .formatting import TIMES, decibels, ranges, significant
from .images import spread
from .plan import STEP_PLAN

KINDS = {COMPUTED: "computed", INHERITED: "inherited", UNUSED: "not needed"}
"""What a cell may be, and how the page calls it."""
ORDERS = ("the last feature", "its line continued", "its parabola continued")
STORAGES = {"computed": "as computed", "bfloat16": "in bfloat16", "int8": "in int8"}
NAMED = 30
"""Most units, or groups of units, that are named beside the figure."""
TALLEST, SHORTEST, FIGURE = 26, 2, 480
"""Pixels of a unit where there are few of them, where there are many, and about of all where there are more than a few."""
LINED = 40
"""Most units between which lines are drawn."""
ALIKE = 0.01
"""Speed-ups that differ by no more than this share are not worth an axis."""

Trial = Mapping[str, float]
"""`speedup` and `psnr_db`."""


@dataclass(frozen=True)
class Name:
    """Of the first of so many units, beside them."""

    text: str
    units: int


@dataclass(frozen=True)
class Cells:
    """Steps from the left, units from the top; every cell is one wide and one high."""

    steps: int
    units: int
    height: int
    """In pixels."""
    line: int | None
    """Height of a unit's name, in pixels, where each has one."""
    shapes: list[tuple[str, str]]
    """What each kind of cell is called, and all of them as SVG path data."""
    lines: str
    names: list[Name]
    ticks: list[Tick]
    strips: list[Strip]


@dataclass(frozen=True)
class Row:
    """One unit as the table has it."""

    name: str
    inherits: str
    computed: str
    unused: str


@dataclass(frozen=True)
class Dot:
    """One trial, from the left and from the top in percent."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Tradeoff:
    """Trials by both of what they are judged by, the chosen one first."""

    dots: list[Dot]
    x_ticks: list[Tick]
    y_ticks: list[Tick]


@dataclass(frozen=True)
class Steps:
    """What the page shows of a step plan."""

    words: str
    cells: Cells
    rows: list[Row]
    facts: list[tuple[str, str]]
    trials: int
    """Plans that were tried and gave images."""
    failed: int
    """Plans that gave none: what they computed was not finite."""
    tradeoff: Tradeoff | None
    """None where fewer than two trials are known, or all are of one speed-up."""
    spread: Histogram | None
    """In its place where they are."""


def step_plan(manifest: Manifest) -> Steps | None:
    """The plan of the denoiser. None where every step is computed."""
    plans = step_plans(manifest.edits)
    if not plans:
        return None
    (plan, *_), trials = plans, [row for row in manifest.learning if "speedup" in row]
    known = [trial for trial in trials if math.isfinite(trial["psnr_db"])]
    alike = len(known) < 2 or _speedup_span(known) <= ALIKE
    return Steps(
        words=next((row.reason for row in manifest.plan if row.format.startswith(STEP_PLAN)), ""),
        cells=_cells(plan, manifest.timesteps),
        rows=[_row(plan, index) for index in range(len(plan.units))],
        facts=_facts(plan, trials[0] if trials else None),
        trials=len(known),
        failed=len(trials) - len(known),
        tradeoff=None if alike else _tradeoff(known),
        spread=histogram([trial["psnr_db"] for trial in known]) if alike and len(known) > 1 else None,
    )


def _cells(plan: StepPlan, timesteps: Sequence[float]) -> Cells:
    steps, units = len(plan.steps), len(plan.units)
    known = timesteps if len(timesteps) == steps else []
    rows = [plan.patterns[index] for index in plan.steps]
    lines = "".join(f"M{step} 0v{units}" for step in range(1, steps))
    lines += "".join(f"M0 {unit}h{steps}" for unit in range(1, units if units <= LINED else 1))
    middle = [100 * (step + 0.5) / steps for step in range(steps)]
    ticks = [Tick(middle[step], str(step + 1), f"{known[step]:g}" if known else "") for step in spread(steps, LABELS)]
    strips = [Strip(step, 1, f"{step_words(step, known)}: {_count(row)}") for step, row in enumerate(rows)]
    height = min(TALLEST, max(SHORTEST, FIGURE // units))
    line = height if units <= NAMED else None
    return Cells(steps, units, units * height, line, _shapes(rows), lines, _names(plan.units), ticks, strips)


def _shapes(rows: Sequence[str]) -> list[tuple[str, str]]:
    """Cells of a kind that lie on top of each other make one shape."""
    paths = dict.fromkeys(KINDS, "")
    for step, row in enumerate(rows):
        unit = 0
        for kind, run in groupby(row):
            count = len(list(run))
            paths[kind] += f"M{step} {unit}h1v{count}h-1z"
            unit += count
    return [(KINDS[kind], path) for kind, path in paths.items() if path]


def _names(units: Sequence[Unit]) -> list[Name]:
    every = math.ceil(len(units) / NAMED)
    return [Name(_name(units[i]), len(units[i : i + every])) for i in range(0, len(units), every)]


def _name(unit: Unit) -> str:
    first, last = unit.modules[0], unit.modules[-1]
    if first == last:
        return first
    inside = first.rpartition(".")[0] == last.rpartition(".")[0]
    return f"{first} to {last.rpartition('.')[2] if inside else last}"


def _count(row: str) -> str:
    counts = {words: row.count(kind) for kind, words in KINDS.items()}
    return f"of {len(row)} units " + ", ".join(f"{count} {words}" for words, count in counts.items() if count)


def _row(plan: StepPlan, index: int) -> Row:
    unit, column = plan.units[index], [plan.patterns[pattern][index] for pattern in plan.steps]
    added = sorted({name for name in unit.adds_to if name})
    inherits = f"what is added to {', '.join(added)}" if added else "all that it gives"
    computed, unused = ([step for step, cell in enumerate(column, 1) if cell == kind] for kind in (COMPUTED, UNUSED))
    return Row(_name(unit), inherits, ranges(computed), ranges(unused))


def _facts(plan: StepPlan, chosen: Trial | None) -> list[tuple[str, str]]:
    steps = len(plan.steps)
    full = steps - len(plan.inheriting)
    facts = [("Computed in full", f"{full} of {steps} steps")]
    if chosen is not None:
        facts.append(("Multiply-accumulates of the denoiser", f"{chosen['speedup']:.2f}{TIMES} fewer"))
        if full < steps:
            percent = significant(100 * _cost(chosen["speedup"], full, steps), 2)
            facts.append(("A step that inherits costs", f"{percent}% of a full one"))
    return [
        *facts,
        ("Forecast", ORDERS[plan.order]),
        ("Forecasts are", "scaled and shifted by channel" if plan.corrected else "taken as they are"),
        ("Features are kept", STORAGES[plan.storage]),
    ]


def _cost(speedup: float, full: int, steps: int) -> float:
    """Of a step that is not computed in full, over one that is, in the mean."""
    return (steps / speedup - full) / (steps - full)


def _speedup_span(trials: Sequence[Trial]) -> float:
    speedups = [trial["speedup"] for trial in trials]
    return max(speedups) / min(speedups) - 1


def _tradeoff(trials: Sequence[Trial]) -> Tradeoff:
    across, up = (close_axis([trial[key] for trial in trials]) for key in ("speedup", "psnr_db"))
    dots = [
        Dot(100 - across.below_top(trial["speedup"]), up.below_top(trial["psnr_db"]), _trial_words(trial, index == 0))
        for index, trial in enumerate(trials)
    ]
    return Tradeoff(dots, [Tick(100 - tick.at, tick.text) for tick in across.ticks], up.ticks)


def _trial_words(trial: Trial, chosen: bool) -> str:
    said = f"{decibels(trial['psnr_db'])} dB at {significant(trial['speedup'])}{TIMES}"
    return f"chosen: {said}" if chosen else said
