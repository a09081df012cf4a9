"""Scales by search: the maths of post-training quantization, knowing tensors only."""

from __future__ import annotations

import torch
from torch import Tensor

from diffpress.kernels import code_range, dequantize, quantize

SHRINKS = 40
"""Candidate weight scales, from the largest weight down to half of it."""
CANDIDATES = 32
"""Candidate activation scales, spaced evenly in their logarithm."""
REACH = 64.0
"""The smallest candidate clips at the largest magnitude divided by this."""


def search_weight_scale(weight: Tensor, importance: Tensor, bits: int) -> Tensor:
    """The scale [O] of each output channel of `weight` [O, I, taps] that loses least.

    The loss is the squared rounding error weighted by `importance` [I], the mean square of the input channel: the error at
    the layer's output where input channels are uncorrelated.
    """
    largest = weight.abs().amax((1, 2)).clamp(min=torch.finfo(torch.float32).tiny * 2**bits)
    best, best_loss = largest / code_range(bits)[1], torch.full_like(largest, torch.inf)
    for shrink in torch.linspace(1.0, 0.5, SHRINKS):
        scale = largest * shrink / code_range(bits)[1]
        error = dequantize(quantize(weight, scale[:, None, None], bits), scale[:, None, None]) - weight
        loss = (error.square().sum(2) * importance).sum(1)
        best, best_loss = torch.where(loss < best_loss, scale, best), torch.minimum(loss, best_loss)
    return best


def candidate_scales(largest: Tensor, bits: int) -> Tensor:
    """Scales [CANDIDATES] from the one that reaches the largest magnitude of any step downwards."""
    top = largest.max().clamp(min=1e-8) / code_range(bits)[1]
    return top * torch.logspace(0, -1, CANDIDATES, base=REACH)


def choose_step_scales(scales: Tensor, errors: Tensor) -> tuple[Tensor, bool]:
    """One scale a step [S] from `scales` [K] and `errors` [2, S, K], and whether the steps really differ.

    Steps are chosen on the first half, smoothed with their neighbours; where that does not beat a single scale on the second
    half, all steps get the single scale.
    """
    chosen, judged = errors
    steps = torch.arange(chosen.shape[0])
    single = chosen.sum(0).argmin().expand(len(steps))
    each = _smooth(chosen).argmin(1)
    differs = bool(judged[steps, each].sum() < judged[steps, single].sum())
    return scales[each if differs else single].clone(), differs


def _smooth(errors: Tensor) -> Tensor:
    """Each step [S, K] averaged with the steps beside it, which see nearly the same inputs."""
    before = torch.cat([errors[:1], errors[:-1]])
    after = torch.cat([errors[1:], errors[-1:]])
    return (before + 2 * errors + after) / 4
