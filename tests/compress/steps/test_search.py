"""Budgets, step modes, neighbours, and a search that goes on where it was killed."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from diffpress.compress.steps.budget import Budget
from diffpress.compress.steps.candidates import Candidate, Forecasting, beginnings, changed, forecastings
from diffpress.compress.steps.schedules import MODES, computed_steps
from diffpress.compress.steps.search import search
from diffpress.compress.steps.trials import Trials, image_error
from diffpress.compress.steps.units import Costs

BUDGET = Budget(Costs((30, 20, 40), 100, (8, 8, 8), 4), 20)


def test_what_a_plan_costs_is_counted_cell_by_cell() -> None:
    cells = np.zeros((20, 3), dtype=bool)
    assert BUDGET.cost(cells) == 20 * 10
    cells[0], cells[3, 1] = True, True
    assert BUDGET.cost(cells) == 20 * 10 + 90 + 20
    assert BUDGET.speedup(cells) == 2000 / 310
    assert BUDGET.fastest == 2000 / (200 + 90)


@pytest.mark.parametrize("speedup", [1.1, 1.8, 2.5, 3.5, 6.0])
def test_as_many_steps_as_a_speed_up_allows(speedup: float) -> None:
    rows = BUDGET.rows(speedup)
    cells = np.zeros((20, 3), dtype=bool)
    cells[:rows] = True
    assert BUDGET.speedup(cells) >= speedup
    cells[rows] = True
    assert BUDGET.speedup(cells) < speedup
    assert BUDGET.rows(BUDGET.fastest * 1.01) == 0


@pytest.mark.parametrize("mode", MODES)
def test_modes_compute_the_first_step_and_as_many_as_asked(mode: str) -> None:
    for count in (1, 7, 19, 20):
        own = computed_steps(mode, 20, count, 1.8)
        assert own[0]
        assert own.sum() == count


def test_modes_are_dense_where_their_names_say() -> None:
    half = {mode: computed_steps(mode, 20, 8, 1.8)[:10].sum() for mode in MODES}
    assert half["early"] > half["uniform"] > half["late"]
    assert computed_steps("centre", 20, 8, 1.8)[5:15].sum() > computed_steps("uniform", 20, 8)[5:15].sum()
    assert np.flatnonzero(computed_steps("uniform", 20, 10)).tolist() == list(range(0, 20, 2))


def test_neighbours_stay_within_the_budget_and_the_patterns() -> None:
    random, own = Random(0), next(beginnings(BUDGET, 1.8, Forecasting(1, True)))
    for _ in range(100):
        child = changed(own, BUDGET, 1.8, 3, random)
        assert child is not None
        assert child != own
        assert BUDGET.allows(child.cells, 1.8)
        assert child.cells[0].all()
        assert len(set(child.rows)) <= 3
        own = child


def quality(own: Candidate) -> float:
    """A stand-in for whole runs: steps in the second half count, and so does order 2."""
    gap = sum(1 + step / 10 for step, row in enumerate(own.cells) if not row.all())
    return gap / (1 + 0.1 * own.forecast.order + 0.05 * own.forecast.trust)


class KilledError(Exception):
    """Ends a search from inside."""


def trials_in(folder: Path, asked: list[Candidate], most: int = 10_000) -> Trials:
    def fitted(own: Candidate) -> Candidate:
        if len(asked) == most:
            raise KilledError
        asked.append(own)
        return own

    # An image of one pixel that is off by the square root of the error.
    run = lambda own: torch.full((1, 1, 1, 1), quality(own) ** 0.5)  # noqa: E731
    return Trials(folder / "trials.jsonl", fitted, run, lambda: torch.zeros(1, 1, 1, 1))  # type: ignore[arg-type]


def found(trials: Trials, patterns: int | None = None) -> list[tuple[Candidate, float]]:
    return search(trials, BUDGET, 1.8, 60, forecastings([1, 2], [True]), patterns, 3, lambda done, total: None)


def test_what_is_found_is_no_worse_than_any_mode_and_keeps_to_the_budget(tmp_path: Path) -> None:
    asked: list[Candidate] = []
    ranked = found(trials_in(tmp_path, asked), patterns=2)
    assert len(ranked) == len(asked) == 60
    assert all(BUDGET.allows(own.cells, 1.8) for own, _ in ranked)
    assert [error for _, error in ranked] == sorted(error for _, error in ranked)
    by_hand = min(quality(own) for own in beginnings(BUDGET, 1.8, Forecasting(2, True, 1.0)))
    assert ranked[0][1] < by_hand * (1 + 1e-6)
    assert ranked[0][0].forecast.order == 2


def test_a_killed_search_goes_on_and_finds_the_same(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir(), (tmp_path / "killed").mkdir()
    expected = found(trials_in(tmp_path / "whole", []))
    before: list[Candidate] = []
    with pytest.raises(KilledError):
        found(trials_in(tmp_path / "killed", before, most=25))
    after: list[Candidate] = []
    assert found(trials_in(tmp_path / "killed", after)) == expected
    assert (len(before), len(after)) == (25, 35)


def test_errors_are_averaged_as_decibels_are() -> None:
    images = torch.zeros(2, 1, 4, 4)
    other = images.clone()
    other[0] += 0.1
    other[1] += 0.001
    decibels = (20 + 60) / 2
    assert image_error(other, images) == pytest.approx(10 ** (-decibels / 10), rel=1e-5)
    assert image_error(other * float("nan"), images) == float("inf")
