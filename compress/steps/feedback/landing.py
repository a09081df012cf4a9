"""What an answer that stands for several steps has to be, so that the scheduler lands where the teacher does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from diffpress.export.runtime.feedback_plan import HELD

MOST = 1.5
"""No held step follows the line through the answers before it further than by this factor, nor turns around."""


class Landing(NamedTuple):
    """What the answer o_k of a step that is not held, k, has to be: T_k = sum_j share_j ô_j + before T_k-."""

    step: int
    shares: Mapping[int, float]
    """Of what the teacher answers at this step and those that are held after it."""
    before: float
    """Of what the answer of the step before it, k-, had to be."""
    weight: float
    """Of an error of the answer in the last sample."""


def outer_steps(steps: str) -> list[int]:
    """The steps that are not held."""
    return [step for step, cell in enumerate(steps) if cell != HELD]


def landings(steps: str, damping: Sequence[float], w: Sequence[float]) -> list[Landing]:
    """Of every step that is not held, with `w` [S] the weight of each step's answer in the last sample.

    Held steps j answer o_j = (1 + g_j) o_k - g_j o_k-, with g_j = d_j (j - k) / (k - k-). What the scheduler makes of it is
    right where sum_j w_j (o_j - ô_j) = 0: the error after the next step that is computed, to first order.
    """
    outer = [*outer_steps(steps), len(steps)]
    found = []
    for place, (k, end) in enumerate(pairwise(outer)):
        before = outer[place - 1] if place else None
        g = {j: 0.0 if before is None else damping[j] * (j - k) / (k - before) for j in range(k, end)}
        weight = sum(w[j] * (1 + g[j]) for j in g)
        shares = {j: w[j] / weight for j in g}
        found.append(Landing(k, shares, sum(w[j] * g[j] for j in g) / weight, weight))
    return found


def targets(landed: Sequence[Landing], taught: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """T_k of every step that is not held, from what the teacher answered at all steps, ô."""
    found: dict[int, Tensor] = {}
    last: Tensor | None = None
    for own in landed:
        mean = sum((share * taught[j] for j, share in own.shares.items()), torch.zeros_like(taught[own.step]))
        last = found[own.step] = mean if last is None else mean + own.before * last
    return found


def fit_damping(products: Tensor, steps: str) -> list[float]:
    """d_j of every step, by least squares: min |ô_j - ô_k - d_j (j - k) / (k - k-) (ô_k - ô_k-)|^2 at held steps j.

    `products` [S, S] are those of the teacher's answers with each other, summed over recorded runs.
    """
    outer, found = outer_steps(steps), [0.0] * len(steps)
    for j in range(len(steps)):
        past = [k for k in outer if k <= j][::-1][:2]
        if steps[j] != HELD or len(past) < 2:
            continue
        k, before = past
        reach = (j - k) / (k - before)
        along = reach * float(products[j, k] - products[j, before] - products[k, k] + products[k, before])
        square = reach**2 * float(products[k, k] - 2 * products[k, before] + products[before, before])
        found[j] = min(max(along / square, 0.0), MOST) if square > 0 else 0.0
    return found
