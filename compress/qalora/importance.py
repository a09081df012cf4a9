"""How much an error at each step weighs in the image."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffpress.export.errors import UnsupportedModelError
from diffpress.export.onnx.tables import build_table

EVEN_SHARE = 0.5
"""Share of the examples that are drawn evenly over the steps: what a step's error does to later steps counts as well."""


class StepImportance(NamedTuple):
    """What the scheduler tells of S steps."""

    sampling_probabilities: Tensor
    """[S] how often each step should be learned from, summing to one."""
    weights: Tensor
    """[S] what the error of a step that was drawn so weighs in the last sample, with its sign; of mean square one."""

    def accumulated(self, error: Tensor, steps: Tensor, together: int) -> Tensor:
        """Squared error of the last sample as far as the scheduler's own sum makes it, for errors [B, ...] at steps [B].

        Every `together` entries are drawn from one run. Errors of a rounded denoiser point the same way at many steps, and
        what points the same way adds up: the square of their mean holds that, the mean of their squares would not.
        """
        weights = self.weights.to(error.device)[steps].view(-1, *[1] * (error.ndim - 1))
        return (error * weights).unflatten(0, (-1, together)).mean(1).square().mean() * together


def step_importance(scheduler: Any, steps: int) -> StepImportance:
    """How the scheduler combines the outputs of `steps` calls; all alike where it is not linear.

    Steps are drawn one half evenly, one half by the weight of their output in the last sample.
    """
    even = torch.full((steps,), 1 / steps)
    try:
        weights = torch.tensor(build_table(scheduler, steps).coefficients[-1][1:]).float()
    except UnsupportedModelError:
        return StepImportance(even, torch.ones(steps))
    if len(weights) != steps:
        return StepImportance(even, torch.ones(steps))
    sampling_probabilities = EVEN_SHARE * even + (1 - EVEN_SHARE) * weights.abs() / weights.abs().sum()
    shares = weights / sampling_probabilities
    return StepImportance(sampling_probabilities, shares / (sampling_probabilities * shares.square()).sum().sqrt())
