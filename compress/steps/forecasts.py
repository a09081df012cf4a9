"""Forecasts in closed form: factors of Newton's terms for each unit and step, then a scale and a shift for each channel.

The correction is that of CacheQuant (Liu et al., 2025, 2503.01323), on forecasts instead of what was cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffpress.export.runtime.step_plan import forecast_weights

from .features import FeatureMoments

RIDGE = 1e-3
"""Of the mean variance of channels, by which a scale is drawn to 1."""
MOST = 1.5
"""No term of a forecast counts for more than it would in exact continuation by this factor, nor is it turned around."""


class Forecast(NamedTuple):
    """How one unit is forecast at one step."""

    damping: list[float]
    """Per order."""
    scale: Tensor
    """[C]"""
    shift: Tensor


def history_of(computed: NDArray[np.bool_], step: int, count: int) -> list[int]:
    """The latest steps before `step` at which `computed` [S] is true, the latest first, `count` at most."""
    return np.flatnonzero(computed[:step])[::-1][:count].tolist()


def fit_forecast(
    moments: FeatureMoments, unit: int, step: int, history: Sequence[int], order: int, correct: bool
) -> Forecast:
    """The forecast of `unit` for `step` from what was computed at `history`, by least squares."""
    past = [place for place in history[: order + 1] if step - place < moments.window]
    products = moments.between(unit, [step, *past])
    damping = _damping(products.sum(0), step, past, order)
    weights = torch.tensor([0.0, *forecast_weights(step, past, damping, len(past))], dtype=torch.double)
    f_y, f_f = products[:, 0] @ weights, torch.einsum("i,cij,j->c", weights, products, weights)
    scale, shift = torch.ones_like(f_y), torch.zeros_like(f_y)
    if correct:
        scale, shift = _correction(moments, unit, [step, *past], weights, f_y, f_f)
    return Forecast(damping, scale, shift)


def _damping(products: Tensor, step: int, past: Sequence[int], order: int) -> list[float]:
    """Least squares over Newton's terms t: min |y - y1 - sum d t|^2, with `products` [N, N] of y and of the past."""
    count = len(past)
    last = np.eye(count)[0]
    terms = []
    for degree in range(1, count):
        only = [float(other == degree) for other in range(1, count)]
        terms.append(np.array(forecast_weights(step, past, only, count)) - last)
    found = [0.0] * order
    if not terms:
        return found
    own, target = np.array(products[1:, 1:]), np.array(products[1:, 0])
    t = np.array(terms)
    gram, right = t @ own @ t.T, t @ (target - own @ last)
    solved = np.linalg.lstsq(gram, right, rcond=1e-9)[0]
    for degree, value in enumerate(solved):
        found[degree] = float(np.clip(value, -MOST, MOST))
    return found


def _correction(
    moments: FeatureMoments, unit: int, steps: Sequence[int], weights: Tensor, f_y: Tensor, f_f: Tensor
) -> tuple[Tensor, Tensor]:
    """Regression of the feature on its forecast, channel by channel: [C] each."""
    count = moments.counts[steps[0], unit]
    mean_y = moments.sums[unit][steps[0]] / count
    mean_f = sum(w * moments.sums[unit][place] for w, place in zip(weights.tolist(), steps, strict=True)) / count
    covariance, variance = f_y / count - mean_f * mean_y, f_f / count - mean_f**2
    ridge = RIDGE * variance.mean()
    scale = (covariance + ridge) / (variance + ridge)
    return scale, mean_y - scale * mean_f


class Forecasts:
    """Fitted when they are first asked for: plans that are tried one after the other share most of them."""

    def __init__(self, moments: FeatureMoments) -> None:
        self.moments = moments
        self._known: dict[tuple[object, ...], Forecast] = {}

    def fitted(self, unit: int, step: int, history: Sequence[int], order: int, correct: bool) -> Forecast:
        """See `fit_forecast`."""
        key = (unit, step, tuple(history), order, correct)
        if key not in self._known:
            self._known[key] = fit_forecast(self.moments, unit, step, history, order, correct)
        return self._known[key]

    def of_plan(self, cells: NDArray[np.bool_], order: int, correct: bool) -> tuple[Tensor, Tensor]:
        """Of a plan that computes where `cells` [S, U] are true: damping [S, U, order] and correction [S, 2, channels]."""
        channels = [own.shape[1] for own in self.moments.sums]
        damping, correction = torch.zeros(*cells.shape, order), torch.zeros(len(cells), 2, sum(channels))
        correction[:, 0] = 1
        for unit, places in enumerate(torch.arange(sum(channels)).split(channels)):
            for step in np.flatnonzero(~cells[:, unit]).tolist():
                found = self.fitted(unit, step, history_of(cells[:, unit], step, order + 1), order, correct)
                damping[step, unit] = torch.tensor(found.damping)
                correction[step, :, places] = torch.stack([found.scale, found.shift]).float()
        return damping, correction
