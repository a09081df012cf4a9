"""How much an error at each step weighs in the image."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffpress.export.errors import UnsupportedModelError
from diffpress.export.portable.tables import table_of

logger = logging.getLogger(__name__)

CANNOT_RUN = (AttributeError, ValueError, TypeError, IndexError, RuntimeError)
"""What schedulers of diffusers raise that cannot be run on their own, or that is none: their step wants more to unpack, other
arguments, the batch of a time step, or another shape."""
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


def step_importance(scheduler: Any, updates: Sequence[int]) -> StepImportance:
    """How the scheduler, its time steps set, combines what it is given; `updates` tells the step of each of its updates.

    Steps are drawn one half evenly, one half by the weight of their output in the last sample; all alike where the
    scheduler is not linear, which is logged.
    """
    steps = max(updates) + 1
    even = torch.full((steps,), 1 / steps)
    weights = scheduler_weights(scheduler, updates)
    if weights is None:
        return StepImportance(even, torch.ones(steps))
    sampling_probabilities = EVEN_SHARE * even + (1 - EVEN_SHARE) * weights.abs() / weights.abs().sum()
    shares = weights / sampling_probabilities
    return StepImportance(sampling_probabilities, shares / (sampling_probabilities * shares.square()).sum().sqrt())


def scheduler_weights(scheduler: Any, updates: Sequence[int]) -> Tensor | None:
    """[S] the weight in the last sample of what is given at each step, its mean where a step is updated at twice."""
    try:
        own = torch.tensor(table_of(scheduler).coefficients[-1][1:])
    except (UnsupportedModelError, *CANNOT_RUN) as error:
        logger.warning("all steps are learned alike: %s", error)
        return None
    if len(own) != len(updates):
        logger.warning("all steps are learned alike: %d updates, %d of the scheduler's own", len(updates), len(own))
        return None
    places = torch.tensor(updates)
    # Each call of a step is an example of its own, so that a step called twice is drawn twice as often.
    weights = torch.bincount(places, own) / torch.bincount(places)
    return weights if weights.any() else None
