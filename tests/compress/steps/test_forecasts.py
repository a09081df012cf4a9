"""Forecasts in closed form, against least squares on the features themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from diffpress.compress.steps.features import FeatureMoments
from diffpress.compress.steps.forecasts import Forecasts, fit_forecast, history_of

STEPS, CHANNELS = 6, 3


def features(shape: tuple[int, ...] = (2, 5, CHANNELS)) -> list[Tensor]:
    """That drift from step to step, each channel its own way."""
    generator = torch.Generator().manual_seed(0)
    start, slope, bend = (torch.randn(shape, generator=generator, dtype=torch.double) for _ in range(3))
    noise = [0.05 * torch.randn(shape, generator=generator, dtype=torch.double) for _ in range(STEPS)]
    return [start + slope * step + 0.05 * bend * step**2 + noise[step] for step in range(STEPS)]


def moments_of(runs: list[list[Tensor]], window: int = STEPS) -> FeatureMoments:
    moments = FeatureMoments(STEPS, [CHANNELS], window)
    for run, own in enumerate(runs):
        for step, y in enumerate(own):
            moments.add(run, step, 0, (y,))
        moments.forget()
    return moments


@pytest.mark.parametrize("order", [0, 1, 2])
def test_damping_is_what_least_squares_gives(order: int) -> None:
    y = features()
    found = fit_forecast(moments_of([y]), 0, 5, [4, 2, 1], order, correct=False)
    first = (y[4] - y[2]) / 2
    second = (first - (y[2] - y[1])) / 3
    terms = [first * 1, second * 1 * 3][:order]
    if not terms:
        assert found.damping == []
        return
    matrix = torch.stack([term.flatten() for term in terms], 1)
    expected = torch.linalg.lstsq(matrix, (y[5] - y[4]).flatten()[:, None]).solution.flatten()
    # Features are added up in float32.
    torch.testing.assert_close(
        torch.tensor(found.damping, dtype=torch.double), expected.clamp(-1.5, 1.5), rtol=1e-3, atol=1e-3
    )


def test_scale_and_shift_are_regressions_channel_by_channel() -> None:
    y = features()
    found = fit_forecast(moments_of([y]), 0, 5, [4, 3], 1, correct=True)
    forecast = (y[4] + found.damping[0] * (y[4] - y[3])).flatten(0, 1)
    for channel in range(CHANNELS):
        own = torch.stack([forecast[:, channel], torch.ones(len(forecast), dtype=torch.double)], 1)
        expected = torch.linalg.lstsq(own, y[5].flatten(0, 1)[:, channel, None]).solution.flatten()
        given = torch.stack([found.scale[channel], found.shift[channel]]).double()
        # The ridge draws a scale to 1 by a thousandth of the mean variance.
        torch.testing.assert_close(given, expected, rtol=2e-2, atol=2e-2)


def test_runs_add_up_and_do_not_mix() -> None:
    first, second = features(), [y.flip(0) * 2 for y in features()]
    apart, together = (
        moments_of([first, second]),
        moments_of([[torch.cat(ys) for ys in zip(first, second, strict=True)]]),
    )
    torch.testing.assert_close(apart.products[0], together.products[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(apart.counts, together.counts)


def test_maps_and_tokens_have_their_channels_in_their_places() -> None:
    y = features()
    maps = [own.movedim(-1, 1)[..., None] for own in y]
    torch.testing.assert_close(moments_of([y]).products[0], moments_of([maps]).products[0], rtol=1e-6, atol=1e-6)


def test_what_lies_outside_of_the_window_is_left_out() -> None:
    y = features()
    near, far = moments_of([y], window=3), moments_of([y])
    assert fit_forecast(near, 0, 5, [4, 1], 1, False).damping == [0.0]
    assert fit_forecast(far, 0, 5, [4, 1], 1, False).damping != [0.0]


def test_a_plan_has_numbers_where_it_inherits_and_neutral_ones_elsewhere() -> None:
    cells = np.array([[True], [False], [True], [False], [False], [True]])
    damping, correction = Forecasts(moments_of([features()])).of_plan(cells, 1, True)
    computed = np.flatnonzero(cells[:, 0]).tolist()
    assert (damping[computed] == 0).all()
    assert (correction[computed, 0] == 1).all()
    assert (correction[computed, 1] == 0).all()
    assert damping[1] == 0, "one feature has no direction"
    assert (damping[[3, 4]] != 0).all()
    assert history_of(cells[:, 0], 4, 2) == [2, 0]
