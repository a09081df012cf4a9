"""A layer on a curve by a few directions of its outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffpress.compress.prune.modulation.low_rank import factorize, largest_error, smallest, span_of


def curve(points: int, width: int, directions: int) -> Tensor:
    """[points, width]: polynomials of so many degrees, away from zero."""
    time = torch.linspace(-1, 1, points, dtype=torch.double)
    powers = torch.stack([time**degree for degree in range(directions + 1)], 1)
    return powers @ torch.randn(directions + 1, width, generator=torch.Generator().manual_seed(0), dtype=torch.double)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(40, 12), (3, 12)], ids=["wider", "narrower than the curve"])
def test_as_many_directions_as_there_are_say_all(rows: int, columns: int, has_bias: bool) -> None:
    """The mean needs none: it goes into the bias."""
    points = curve(50, columns, 4)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.double)
    bias = torch.randn(rows, generator=generator, dtype=torch.double) if has_bias else None
    expected = points @ weight.T + (0 if bias is None else bias)
    factors = factorize(weight, bias, span_of(points))
    errors = []
    for rank in range(1, min(rows, 4) + 1):
        down, up, constant = factors.cut(rank)
        assert (down.shape, up.shape, constant.shape) == ((rank, columns), (rows, rank), (rows,))
        errors.append(largest_error(points @ down.T @ up.T + constant, expected))
    # The condition of the curve, which is made of a hundred numbers, times the last digit of float64.
    assert errors[-1] < 1e4 * torch.finfo(torch.double).eps
    assert all(error > 1e-6 for error in errors[:-1])


def test_a_direction_that_the_weight_does_not_read_costs_none() -> None:
    points = curve(50, 12, 4)
    loud = points.clone()
    loud[:, 3] += 100 * torch.sin(torch.arange(50, dtype=torch.double))
    weight = torch.randn(20, 12, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    weight[:, 3] = 0
    down, up, constant = factorize(weight, None, span_of(loud)).cut(4)
    assert largest_error(loud @ down.T @ up.T + constant, loud @ weight.T) < 1e4 * torch.finfo(torch.double).eps


def test_small_outputs_count_as_large_ones() -> None:
    """Half of the points answer a millionth in a direction of their own: that is what one direction is spent on."""
    points = torch.zeros(40, 3, dtype=torch.double)
    points[:20, 0] = 1 + 0.01 * torch.linspace(-1, 1, 20, dtype=torch.double)
    points[20:, 1] = 1e-6
    weight = torch.eye(3, dtype=torch.double)
    down, up, constant = factorize(weight, None, span_of(points)).cut(2)
    found = points @ down.T @ up.T + constant
    assert largest_error(found, points) < 1e-6


def test_a_layer_of_zeros_does_not_err() -> None:
    points = curve(30, 8, 3)
    down, up, constant = factorize(torch.zeros(5, 8), torch.zeros(5), span_of(points)).cut(1)
    assert largest_error(points @ down.T @ up.T + constant, torch.zeros(30, 5, dtype=torch.double)) == 0


def test_the_largest_error_is_that_of_a_row() -> None:
    expected = torch.tensor([[3.0, 4.0], [300.0, 400.0]])
    found = torch.tensor([[3.0, 4.5], [300.0, 401.0]])
    assert largest_error(found, expected) == pytest.approx(0.1)


@pytest.mark.parametrize("first", [1, 2, 7, 8])
def test_the_smallest_that_fits(first: int) -> None:
    assert smallest(8, lambda number: number >= first) == first
