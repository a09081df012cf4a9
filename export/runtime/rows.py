"""What each call of a denoiser does by a step plan: looked up, as a call may take no longer than its few forecasts."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

from .step_plan import COMPUTED, INHERITED, StepPlan, forecast_weights, rows_at, rows_of

Flags = tuple[bool, ...]


class Row(NamedTuple):
    """One call."""

    computes: Flags
    """Per unit."""
    pattern: int | None
    """Which of the plan's it is; None where other numbers of steps make one of their own."""
    weights: dict[int, list[float]]
    """Of past features in the forecasts, by unit."""
    correction: int | None
    """Which of the corrections is for it."""


class Rows:
    """The rows of a plan."""

    def __init__(self, plan: StepPlan) -> None:
        self.plan = plan
        self.cells: list[Flags] = [tuple(cell == COMPUTED for cell in pattern) for pattern in plan.patterns]
        self.patterns = {cells: index for index, cells in enumerate(self.cells)}
        inheriting = plan.inheriting if plan.corrected else []
        self.corrections = {step: index for index, step in enumerate(inheriting)}

    def at(
        self,
        position: float,
        last: float | None,
        places: Mapping[int, Sequence[float]],
        damping: Sequence[Sequence[float]],
    ) -> Row:
        """The row of a call at `position`, the one before it having been at `last`.

        `places` at which units were computed that left features, the latest first; `damping` [units, order] of the step.
        """
        step = self.step(position)
        computes = self._computes(rows_at(position, last, len(self.plan.steps)))
        pattern = self._pattern(computes, places)
        if pattern is None:
            computes = tuple(cell or unit not in places for unit, cell in enumerate(computes))
            pattern = self._pattern(computes, places)
        cells = rows_of([computes])[0] if pattern is None else self.plan.patterns[pattern]
        weights = {
            unit: forecast_weights(position, places[unit], damping[unit], self.plan.kept)
            for unit, cell in enumerate(cells)
            if cell == INHERITED
        }
        return Row(computes, pattern, weights, self.corrections.get(step))

    def step(self, position: float) -> int:
        """The step of the plan that is nearest."""
        return min(round(position), len(self.plan.steps) - 1)

    def _computes(self, steps: Sequence[int]) -> Flags:
        first, *others = (self.cells[self.plan.steps[step]] for step in steps)
        return tuple(map(any, zip(first, *others, strict=True))) if others else first

    def _pattern(self, computes: Flags, places: Container[int]) -> int | None:
        """The one that computes just these units, if all that it forecasts have left features."""
        pattern = self.patterns.get(computes)
        if pattern is None:
            return None
        cells = self.plan.patterns[pattern]
        return pattern if all(cell != INHERITED or unit in places for unit, cell in enumerate(cells)) else None


def looked_at(plan: StepPlan) -> Flags:
    """Per unit whether any step looks at a forecast of it."""
    return tuple(INHERITED in column for column in zip(*plan.patterns, strict=True))
