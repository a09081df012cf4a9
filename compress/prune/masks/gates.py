"""Hard concrete gates (Louizos et al. 2018, 1712.01312), shifted so that what they are expected to leave fits a budget."""

from __future__ import annotations

from collections.abc import Mapping
from math import log

import torch
from torch import Tensor

TEMPERATURE = 0.83
LOWEST, HIGHEST = -0.1, 1.1
"""What a gate is stretched to before it is cut to 0..1, so that it is either with some probability."""
BOUND = 0.5
"""Delta of EcoDiff: logistic noise stays within log((1 + delta) / delta), a gate that is wide open stays open."""
HALVINGS = 50
"""Of the interval that the shift is looked for in."""

Units = Mapping[str, Tensor]
"""[units] something of each unit, by the names of structures."""


def noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Bounded logistic noise, one number a unit."""
    u = torch.rand(like.shape, generator=generator).to(like)
    return torch.log((u + BOUND) / (1 - u + BOUND))


def gate(logits: Tensor, noise: Tensor) -> Tensor:
    """How far each unit is open, in 0..1: s = sigmoid((noise + logits) / temperature), stretched and cut."""
    s = torch.sigmoid((noise + logits) / TEMPERATURE)
    return (s * (HIGHEST - LOWEST) + LOWEST).clamp(0, 1)


def open_probability(logits: Tensor) -> Tensor:
    """That a unit is not shut: what the exact L0 norm is the sum of (eq. 12)."""
    return torch.sigmoid(logits - TEMPERATURE * log(-LOWEST / HIGHEST))


def within_budget(logits: Units, weights: Mapping[str, float], shut: float) -> dict[str, Tensor]:
    """The logits, shifted together so that what is expected to be shut weighs `shut`.

    In the place of a regulariser and its strength: the budget is kept at every step, and gradients are those along it.
    """
    every = torch.cat([weights[name] * torch.ones_like(own) for name, own in logits.items()])
    own = torch.cat(list(logits.values()))

    def shut_by(shift: Tensor | float) -> Tensor:
        return (every * (1 - open_probability(own - shift))).sum()

    low, high = float(own.detach().min()) - 20, float(own.detach().max()) + 20
    with torch.no_grad():
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if shut_by(middle) < shut else (low, middle)
    # One step of Newton's from the solution: no change, but the solution's own gradient.
    shift = torch.tensor(low, dtype=own.dtype, device=own.device, requires_grad=True)
    (slope,) = torch.autograd.grad(shut_by(shift), shift)
    moved = low - (shut_by(low) - shut_by(low).detach()) / slope
    return {name: own - moved for name, own in logits.items()}
