"""Searches: none may lose to where it begins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffpress.calibration.observe import LayerInput, RangeCandidates, range_errors
from diffpress.compress.scales import (
    CANDIDATES,
    MARGIN,
    REACH,
    choose_steps,
    range_candidates,
    search_group_scales,
    search_smoothing,
    search_weight_scale,
)
from diffpress.kernels import code_range, dequantize, quantize, quantize_dequantize

FLOAT = torch.finfo(torch.float32).eps


def loss(weight: Tensor, importance: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Weighted squared rounding error of each output channel."""
    rounded = dequantize(quantize(weight, scale[:, None, None], bits), scale[:, None, None])
    return ((rounded - weight).square().sum(2) * importance).sum(1)


def weights_and_importance(rows: int = 7, channels: int = 33, taps: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, channels, taps, generator=generator), torch.rand(channels, generator=generator) ** 4


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_searched_weight_scale_never_loses_to_the_largest_magnitude(bits: int) -> None:
    weight, importance = weights_and_importance()
    searched = search_weight_scale(weight, importance, bits)
    plain = weight.abs().amax((1, 2)) / code_range(bits)[1]
    # The same candidate is among those searched; both sums round once a term.
    slack = 1 + 2 * weight[0].numel() * FLOAT
    for sign in (1, -1):
        assert (loss(weight, importance, searched, bits) <= loss(weight, importance, sign * plain, bits) * slack).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_code_that_is_left_over_goes_to_the_side_that_needs_it(bits: int) -> None:
    """Weights on a grid with one more code above zero than below: upside down they are on the grid there is."""
    low, high = code_range(bits)
    grid = torch.arange(-high, -low + 1).float().repeat(8).view(1, -1, 1)
    importance = torch.ones(grid.shape[1])
    up, down = search_weight_scale(grid, importance, bits), search_weight_scale(-grid, importance, bits)
    assert up < 0 < down
    assert torch.equal(up, -down)
    positive = torch.linspace(float(down) / 4, 4 * float(down), 1000)
    best_positive = min(float(loss(grid, importance, scale[None], bits)) for scale in positive)
    assert loss(grid, importance, up, bits) < best_positive


def test_weight_scale_follows_the_channels_that_matter() -> None:
    """One outlier in a channel that is never active must not set the step of all others."""
    weight = torch.linspace(-1, 1, 64).view(1, 64, 1).clone()
    weight[0, 0, 0] = 1.9
    importance = torch.ones(64)
    importance[0] = 0.0
    blind = search_weight_scale(weight, torch.ones(64) + 1e6 * (torch.arange(64) == 0), 4)
    seeing = search_weight_scale(weight, importance, 4)
    assert seeing.abs() < 0.75 * blind.abs()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_channel_of_zeros_gets_a_scale_that_can_be_divided_by(bits: int) -> None:
    weight = torch.zeros(2, 5, 1)
    weight[1] = 1.0
    scale = search_weight_scale(weight, torch.ones(5), bits)
    assert scale.log().isfinite().all()
    assert (1 / scale).isfinite().all()
    assert (quantize(weight, scale[:, None, None], bits)[0] == 0).all()


@pytest.mark.parametrize(("channels", "taps", "group_size"), [(33, 1, 8), (5, 9, 8), (5, 9, 64), (16, 1, 8), (3, 1, 3)])
def test_groups_are_searched_one_by_one(channels: int, taps: int, group_size: int) -> None:
    weight, importance = weights_and_importance(4, channels, taps)
    found = search_group_scales(weight, importance, 4, group_size)
    columns, heavy = weight.flatten(1), importance.repeat_interleave(taps)
    groups = list(zip(columns.split(group_size, 1), heavy.split(group_size), strict=True))
    assert found.shape == (4, len(groups)) == (4, -(-channels * taps // group_size))
    for index, (group, own) in enumerate(groups):
        alone = search_weight_scale(group[:, :, None], own, 4)
        assert torch.equal(found[:, index], alone)


def layer_input(rows: Tensor) -> LayerInput:
    """What would have been seen of a layer that is fed `rows`."""
    return LayerInput(rows.amin(0).clamp(max=0), rows.amax(0).clamp(min=0), rows.square().mean(0), rows, False)


def candidates(rows: Tensor, bits: int, asymmetric: bool) -> list[RangeCandidates]:
    """Candidates for a layer that is fed `rows` as they are."""
    return range_candidates(layer_input(rows), torch.ones(rows.shape[1]), bits, asymmetric)


def expected_loss(weight: Tensor, seen: LayerInput, smoothing: Tensor, bits: tuple[int, int]) -> float:
    """Squared error at the output from rounding the weights, and from rounding the input."""
    smoothed = weight / smoothing[None, :, None]
    heavy = seen.second_moment * smoothing.square()
    scale = search_weight_scale(smoothed, heavy, bits[0])
    rows = seen.rows * smoothing
    grids = candidates(rows, bits[1], True)
    inputs = min(float(range_errors(rows, smoothed.square().sum((0, 2)), grid, bits[1]).min()) for grid in grids)
    return float(loss(smoothed, heavy, scale, bits[0]).sum()) + inputs


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 4)], ids=str)
@pytest.mark.parametrize("outlier", [1.0, 10.0, 100.0])
def test_smoothing_never_loses_to_none(bits: tuple[int, int], outlier: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 24, generator=generator)
    rows[:, 3] *= outlier
    weight, seen = torch.randn(10, 24, 1, generator=generator), layer_input(rows)
    smoothing = search_smoothing(weight, seen, bits, True)
    slack = 1 + 2 * weight.numel() * FLOAT
    with_it = expected_loss(weight, seen, smoothing, bits)
    assert with_it <= expected_loss(weight, seen, torch.ones(24), bits) * slack


def test_smoothing_evens_out_an_outlier_channel() -> None:
    """The true error at the output, weights and inputs both rounded as they would be, on rows it was not chosen on."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 24, generator=generator)
    rows[:, 3] *= 50
    weight, seen = torch.randn(10, 24, 1, generator=generator), layer_input(rows[:200])
    smoothing = search_smoothing(weight, seen, (8, 8), False)
    assert int(smoothing.argmin()) == 3

    def error(smoothing: Tensor) -> float:
        smoothed, fed = weight / smoothing[None, :, None], rows * smoothing
        scale = search_weight_scale(smoothed, fed[:200].square().mean(0), 8)
        rounded_weight = quantize_dequantize(smoothed, scale[:, None, None], 8)[:, :, 0]
        (grid,) = candidates(fed[:200], 8, False)
        best = grid.scale[range_errors(fed[:200], rounded_weight.square().sum(0), grid, 8).argmin()]
        output = quantize_dequantize(fed[200:], best, 8) @ rounded_weight.t()
        return float((output - rows[200:] @ weight[:, :, 0].t()).square().mean())

    # Where one channel of 24 sets the range, its step is some 50 / 3 times too large for all others.
    assert error(smoothing) < error(torch.ones(24)) / 4


def test_smoothing_moves_nothing_on_average() -> None:
    """Its geometric mean is one, so that neither weights nor inputs grow as a whole."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 24, generator=generator) * torch.logspace(-1, 2, 24)
    smoothing = search_smoothing(torch.randn(10, 24, 1, generator=generator), layer_input(rows), (4, 4), True)
    assert (smoothing != 1).any()
    assert abs(float(smoothing.log().mean())) <= 24 * FLOAT * float(smoothing.log().abs().max())


ROWS = {
    "both sides": torch.linspace(-3, 2, 60).view(20, 3),
    "above zero": torch.linspace(0.5, 4, 60).view(20, 3),
    "below zero": -torch.linspace(0.5, 4, 60).view(20, 3),
    "mostly above": torch.nn.functional.silu(torch.linspace(-6, 6, 60)).view(20, 3),
    "nothing": torch.zeros(20, 3),
}


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_every_candidate_holds_zero_exactly(rows: Tensor, bits: int) -> None:
    for grid in candidates(rows, bits, True):
        assert len(grid.scale) == CANDIDATES[bits]
        assert (grid.scale > 0).all()
        zero = grid.zero_point
        assert (quantize_dequantize(torch.zeros(1), grid.scale, bits, zero) == 0).all()
        if zero is not None:
            assert torch.equal(zero, zero.round().clamp(*code_range(bits)))


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_candidates_begin_beyond_the_whole_range_and_fall(rows: Tensor, bits: int) -> None:
    symmetric, asymmetric = candidates(rows, bits, True)
    low, high = float(rows.min().clamp(max=0)), float(rows.max().clamp(min=0))
    first, last = code_range(bits)
    assert symmetric.zero_point is None
    assert asymmetric.zero_point is not None
    if high > low:
        assert float(symmetric.scale[0]) == pytest.approx(MARGIN * max(-low, high) / last, rel=3 * FLOAT)
        assert float(asymmetric.scale[0]) == pytest.approx(MARGIN * (high - low) / (2**bits - 1), rel=3 * FLOAT)
        assert float(asymmetric.zero_point[0]) == round(first - MARGIN * low / float(asymmetric.scale[0]))
    for grid in (symmetric, asymmetric):
        # The reciprocal power of a logarithm's rounding error at this size.
        assert float(grid.scale[0] / grid.scale[-1]) == pytest.approx(REACH[bits], rel=8 * FLOAT)
        assert (grid.scale[1:] < grid.scale[:-1]).all()
        zero = None if grid.zero_point is None else grid.zero_point[:1]
        # A zero point is rounded too, and so cuts off another half step at one end.
        steps = 0.5 if zero is None else 1.0
        error = (quantize_dequantize(rows, grid.scale[:1], bits, zero) - rows).abs().max()
        assert error <= grid.scale[0] * steps * (1 + 2**bits * FLOAT)


def test_only_symmetric_candidates_unless_asked() -> None:
    (grid,) = candidates(ROWS["above zero"], 4, False)
    assert grid.zero_point is None
    assert torch.equal(grid.scale, candidates(ROWS["above zero"], 4, True)[0].scale)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("name", ["above zero", "below zero", "mostly above"])
def test_a_zero_point_wins_on_one_sided_inputs(name: str, bits: int) -> None:
    """Symmetric codes leave nearly half of theirs unused: nearly twice the step, up to four times the squared error."""
    rows = ROWS[name].repeat(5, 1)
    symmetric, asymmetric = (
        float(range_errors(rows, torch.ones(3), grid, bits).min()) for grid in candidates(rows, bits, True)
    )
    assert asymmetric < symmetric / 2


def test_long_tails_are_clipped_where_codes_are_few() -> None:
    rows = torch.randn(300, 5, generator=torch.Generator().manual_seed(0)) ** 3
    for grid in candidates(rows, 4, True):
        errors = range_errors(rows, torch.ones(5), grid, 4)
        whole = RangeCandidates(grid.scale[:1], None if grid.zero_point is None else grid.zero_point[:1])
        assert errors.min() < range_errors(rows, torch.ones(5), whole, 4)[0]


def test_steps_get_their_own_candidates_only_where_that_holds_on_the_other_half() -> None:
    early, late = torch.tensor([1.0, 5.0, 9.0]), torch.tensor([9.0, 5.0, 1.0])
    steps = torch.stack([early] * 4 + [late] * 4)
    chosen, differs = choose_steps(torch.stack([steps, steps]))
    assert differs
    assert chosen.tolist() == [0] * 4 + [2] * 4
    chosen, differs = choose_steps(torch.stack([steps, steps.flip(0)]))
    assert not differs
    assert chosen.tolist() == [int(steps.sum(0).argmin())] * 8


def test_the_choice_never_loses_to_a_single_candidate_where_it_is_judged() -> None:
    for seed in range(20):
        errors = torch.rand(2, 6, 5, generator=torch.Generator().manual_seed(seed))
        chosen, _ = choose_steps(errors)
        steps, single = torch.arange(6), errors[0].sum(0).argmin()
        # At most a rounding of six terms.
        assert errors[1, steps, chosen].sum() <= errors[1, :, single].sum() * (1 + 6 * FLOAT)


def test_one_step_is_no_reason_to_differ() -> None:
    chosen, differs = choose_steps(torch.rand(2, 1, 5, generator=torch.Generator().manual_seed(0)))
    assert chosen.shape == (1,)
    assert not differs
