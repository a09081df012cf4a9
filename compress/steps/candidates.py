"""Plans to try, and how one becomes another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import numpy as np

from diffpress.export.runtime.step_plan import cells_of, rows_of

from .budget import Budget, Cells
from .schedules import BENDS, MODES, computed_steps

TRUST = (0.0, 0.5, 1.0)
"""How far damping may be moved from least squares towards exact continuation: errors that point the same way at every step
add up, and least squares makes some of them.
"""
MOVES = 200
"""Attempts at a change that stays within the budget."""


class Forecasting(NamedTuple):
    """How what is not computed is forecast."""

    order: int
    corrected: bool
    trust: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """A plan up to the numbers that follow from it in closed form."""

    rows: tuple[str, ...]
    """A character a unit, as patterns of plans have."""
    forecast: Forecasting

    @classmethod
    def of(cls, cells: Cells, forecast: Forecasting) -> Candidate:
        """That computes where `cells` are true."""
        return cls(tuple(rows_of(cells)), forecast)

    @property
    def cells(self) -> Cells:
        """[steps, units]"""
        return cells_of(self.rows)


def by_hand(mode: str, bend: float, budget: Budget, speedup: float, forecast: Forecasting) -> Candidate:
    """All units computed at the same steps, as many as are allowed."""
    own = computed_steps(mode, budget.steps, budget.rows(speedup), bend)
    return Candidate.of(np.repeat(own[:, None], len(budget.costs.units), 1), forecast)


def beginnings(budget: Budget, speedup: float, forecast: Forecasting) -> Iterator[Candidate]:
    """Every mode, bent less and more."""
    for bend in BENDS:
        for mode in MODES:
            yield by_hand(mode, bend, budget, speedup, forecast)


def changed(own: Candidate, budget: Budget, speedup: float, patterns: int | None, random: Random) -> Candidate | None:
    """A neighbour of `own` that is as fast as asked, with so many different rows at the most; None where none was found."""
    for _ in range(MOVES):
        cells = random.choice((_moved_row, _moved_row, _swapped_cells, _filled))(own.cells, random)
        found = Candidate.of(cells, own.forecast)
        fits = budget.allows(cells, speedup) and cells[0].all() and len(set(found.rows)) <= (patterns or len(cells))
        if fits and found != own:
            return found
    return None


def forecastings(orders: Sequence[int], corrected: Sequence[bool]) -> list[Forecasting]:
    """Every kind of forecast; one that only holds has no damping to be trusted."""
    return [
        Forecasting(order, correct, trust)
        for order in orders
        for correct in corrected
        for trust in (TRUST if order else TRUST[:1])
    ]


def _moved_row(cells: Cells, random: Random) -> Cells:
    """A row changes places with one nearby."""
    made = cells.copy()
    place = random.randrange(1, len(cells))
    other = min(max(1, place + random.choice((-2, -1, 1, 2))), len(cells) - 1)
    made[[place, other]] = made[[other, place]]
    return made


def _swapped_cells(cells: Cells, random: Random) -> Cells:
    """Some units are computed at another step than before."""
    made = cells.copy()
    first, last = sorted(random.sample(range(cells.shape[1] + 1), 2))
    place, other = random.sample(range(1, len(cells)), 2)
    made[place, first:last], made[other, first:last] = cells[other, first:last], cells[place, first:last]
    return made


def _filled(cells: Cells, random: Random) -> Cells:
    """Some units are computed at one step more."""
    made = cells.copy()
    first, last = sorted(random.sample(range(cells.shape[1] + 1), 2))
    made[random.randrange(1, len(cells)), first:last] = True
    return made
