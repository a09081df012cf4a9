"""What a step computes and what it inherits from earlier steps: a plan as data, and its arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, prod
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

COMPUTED, INHERITED, UNUSED = "#", ".", "-"
"""Cells of a plan, as its patterns spell them; an unused one is left out, as nothing that is left looks at it."""
BETWEEN = 1e-3
"""Share of a step within which a position counts as that of the step."""
Storage = Literal["computed", "bfloat16", "int8"]
"""How cached features are held: as they were computed, or in fewer bits."""


class Unit(BaseModel):
    """A part of a denoiser that a step may inherit instead of computing it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    modules: tuple[str, ...] = Field(min_length=1)
    """Dotted paths inside the denoiser; several are called one after the other, each on what the one before gave."""
    adds_to: tuple[str | None, ...]
    """Per tensor that a module gives back: the argument that it is added to, which stays fresh where the rest is inherited;
    None where all of the tensor is inherited."""
    channels: tuple[int, ...]
    """Per tensor that it gives back."""
    gives: tuple[bool, ...] | None = None
    """Where a tuple is given back: which of its places hold a tensor, the others None."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if len(self.modules) > 1 and None in self.adds_to:
            raise ValueError("modules that follow each other must add to what they are given")
        if len(self.channels) != len(self.adds_to):
            raise ValueError("each tensor that is given back needs its channels")
        return self


class StepPlan(BaseModel):
    """Rows are steps, columns are units; a cell is computed or inherited."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    part: Literal["step_plan"] = "step_plan"
    units: tuple[Unit, ...] = Field(min_length=1)
    patterns: tuple[str, ...] = Field(min_length=1)
    """The different rows: one character a unit, `#` where it is computed, `.` where it is inherited, `-` where nobody looks."""
    steps: tuple[int, ...] = Field(min_length=1)
    """Which pattern each step has. The first step is computed in full."""
    skipped: tuple[tuple[str, ...], ...] = ()
    """Per pattern: modules, or units as a whole, that are not called, as nobody looks at what they give."""
    order: Literal[0, 1, 2] = 1
    """Highest order of the forecast: 0 holds the last feature, 1 continues its line, 2 its parabola."""
    corrected: bool = False
    """Forecasts are multiplied and shifted channel by channel."""
    storage: Storage = "computed"

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        known = {COMPUTED, INHERITED, UNUSED}
        if any(len(row) != len(self.units) or set(row) - known for row in self.patterns):
            raise ValueError(f"each pattern needs {len(self.units)} characters out of {COMPUTED}{INHERITED}{UNUSED}")
        if any(not 0 <= index < len(self.patterns) for index in self.steps):
            raise ValueError(f"steps must name one of {len(self.patterns)} patterns")
        if set(self.patterns[self.steps[0]]) != {COMPUTED}:
            raise ValueError("the first step has nothing to inherit")
        if self.skipped and len(self.skipped) != len(self.patterns):
            raise ValueError("each pattern needs what it skips")
        return self

    @classmethod
    def of(cls, units: Sequence[Unit], cells: NDArray[np.bool_], **settings: object) -> Self:
        """The plan that computes where `cells` [steps, units] are true."""
        rows = rows_of(cells)
        patterns = tuple(dict.fromkeys(rows))
        return cls.model_validate(
            {"units": tuple(units), "patterns": patterns, "steps": tuple(map(patterns.index, rows)), **settings}
        )

    @property
    def cells(self) -> NDArray[np.bool_]:
        """[steps, units] whether it is computed."""
        return cells_of([self.patterns[index] for index in self.steps])

    @property
    def inheriting(self) -> list[int]:
        """Steps at which anything is inherited."""
        return [step for step, index in enumerate(self.steps) if set(self.patterns[index]) != {COMPUTED}]

    @property
    def channels(self) -> int:
        """Of all tensors of all units."""
        return sum(sum(unit.channels) for unit in self.units)

    def words(self) -> str:
        """What the report calls it."""
        return f"step plan, {len(self.patterns)} patterns of {len(self.units)} units"

    def why_not_exported(self) -> None:
        """Graphs can hold it."""

    def exact(self) -> tuple[str, ...]:
        """Tensors of the part whose dtype no loader may change."""
        return ("damping", "correction") if self.corrected else ("damping",)

    @property
    def kept(self) -> int:
        """Features of a unit that a forecast looks at."""
        return self.order + 1


def rows_of(cells: NDArray[np.bool_] | Sequence[Sequence[bool]]) -> list[str]:
    """As patterns are spelt: a row computes where `cells` [steps, units] are true."""
    return ["".join(COMPUTED if cell else INHERITED for cell in row) for row in cells]


def cells_of(rows: Sequence[str]) -> NDArray[np.bool_]:
    """[steps, units] whether it is computed."""
    return np.array([[cell == COMPUTED for cell in row] for row in rows])


def rows_at(position: float, last: float | None, steps: int) -> list[int]:
    """The rows that a call at `position` stands for, the call before it having been at `last`.

    With as many steps as the plan has that is one; with fewer all that were passed, with more the nearest.
    """
    nearest = min(round(position), steps - 1)
    if last is None:
        return [nearest]
    passed = range(floor(last + BETWEEN) + 1, floor(position + BETWEEN) + 1)
    return list(passed) or [nearest]


def forecast_weights(position: float, history: Sequence[float], damping: Sequence[float], count: int) -> list[float]:
    """What features computed at `history`, the latest first, weigh in the one forecast for `position`: `count` of them.

    Newton's divided differences, each term but the first times its `damping`; what the history is too short for is left out.
    """
    weights = [1.0] + [0.0] * (count - 1)
    reach = 1.0
    for degree in range(1, min(count, len(history))):
        reach *= position - history[degree - 1]
        known = history[: degree + 1]
        for index, place in enumerate(known):
            weights[index] += (
                damping[degree - 1] * reach * (1 / prod(place - other for other in known if other != place))
            )
    return weights


def last_of_run(position: float, last: float | None, steps: int) -> bool:
    """Whether no further call can follow that is as far from this one as this one from the `last`."""
    return last is not None and ceil(position - BETWEEN) + (position - last) > steps - 1 + BETWEEN
