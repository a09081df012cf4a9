"""How much an error at each step weighs in the picture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffpress.export.errors import UnsupportedModelError
from diffpress.export.onnx.tables import build_table

EVEN_SHARE = 0.5
"""Share of the examples that are drawn evenly over the steps: what a step's error does to later steps counts as well."""


def step_importance(scheduler: Any, steps: int) -> Tensor:
    """How often each step [S] should be learned from, summing to one.

    One half evenly, one half by the weight of the step's output in the last sample, which the scheduler itself tells; all
    evenly where it is not linear.
    """
    even = torch.full((steps,), 1 / steps)
    try:
        weights = torch.tensor(build_table(scheduler, steps).coefficients[-1][1:]).abs()
    except UnsupportedModelError:
        return even
    if len(weights) != steps:
        return even
    return EVEN_SHARE * even + (1 - EVEN_SHARE) * (weights / weights.sum()).float()
