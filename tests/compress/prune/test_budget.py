"""What goes from where, beside all choices that there are."""

from __future__ import annotations

from itertools import accumulate, product
from random import Random

import pytest

from diffpress.compress.prune.budget import Curve, choose, counts_of, step_of


def convex(seed: int, weights: list[float], step: int = 1) -> dict[str, Curve]:
    """Of four units, or four steps of units, each; every one costs more than the one before."""
    random = Random(seed)
    curves = {}
    for index, weight in enumerate(weights):
        errors = list(accumulate(sorted(random.uniform(0.1, 1) for _ in range(4))))
        curves[str(index)] = Curve([step * count for count in range(1, 5)], errors, weight, step)
    return curves


def cost(curves: dict[str, Curve], counts: dict[str, int]) -> tuple[float, float]:
    """What is removed, and what it costs."""
    errors = {name: dict(zip([0, *own.counts], [0.0, *own.errors], strict=True)) for name, own in curves.items()}
    weight = sum(count * curves[name].weight for name, count in counts.items())
    return weight, sum(errors[name][count] for name, count in counts.items())


def choices(curves: dict[str, Curve]) -> list[dict[str, int]]:
    return [dict(zip(curves, own, strict=True)) for own in product(*([0, *curve.counts] for curve in curves.values()))]


@pytest.mark.parametrize("seed", range(5))
def test_of_units_that_weigh_the_same_no_choice_costs_less(seed: int) -> None:
    curves = convex(seed, [1, 1, 1])
    for target in range(1, 13):
        found = cost(curves, choose(curves, target))
        assert found[0] == target
        assert found[1] == pytest.approx(
            min(error for weight, error in map(lambda own: cost(curves, own), choices(curves)) if weight >= target)
        )


@pytest.mark.parametrize("seed", range(5))
def test_nothing_that_removes_as_much_costs_less(seed: int) -> None:
    curves = convex(seed, [1, 2.5, 7], step=2)
    for target in (0.5, 3, 11, 20, 42, 84):
        weight, error = cost(curves, choose(curves, target))
        # A step of the heaviest more at the most.
        assert target <= weight < target + 2 * 7
        others = [cost(curves, own) for own in choices(curves)]
        assert not any(more >= weight and less < error - 1e-12 for more, less in others)


def test_all_that_may_go_goes_where_it_is_asked_for() -> None:
    curves = convex(0, [1, 3])
    assert choose(curves, 4 * (1 + 3)) == {"0": 4, "1": 4}
    assert choose(curves, 1e9) == {"0": 4, "1": 4}


def test_a_count_that_costs_more_than_its_neighbours_is_passed_over() -> None:
    """Slopes are those of the lower hull, and rise."""
    curve = Curve([2, 4, 6, 8], [0.5, 5.0, 3.0, 8.0], 2.0)
    assert curve.slopes() == [(0.125, 0, 2), (0.3125, 2, 6), (1.25, 6, 8)]
    line = Curve([1, 2], [2.0, 2.0], 1.0)
    assert line.slopes() == [(1.0, 0, 2)]


@pytest.mark.parametrize(("count", "multiple", "step"), [(64, 8, 8), (1280, 8, 8), (56, 8, 1), (100, 8, 1), (12, 1, 1)])
def test_what_is_kept_is_a_multiple_where_there_are_many(count: int, multiple: int, step: int) -> None:
    assert step_of(count, multiple) == step
    measured = counts_of(count, step)
    assert measured == sorted(set(measured))
    assert all((count - gone) % step == 0 and 0 < gone < count for gone in measured)
    assert measured[-1] == count - step


def test_one_of_two_heads_may_go() -> None:
    assert counts_of(2, 1) == [1]
