"""Scales, zero points and smoothing by search: the maths of rounding to nearest, knowing tensors only."""

from __future__ import annotations

import torch
from torch import Tensor

from diffpress.calibration.observe import LayerInput, RangeCandidates, quantize_dequantize, range_errors
from diffpress.kernels import code_range

SHRINKS = 40
"""Candidate weight scales of either sign, from the largest weight downwards."""
SMALLEST_SHRINK = {8: 0.8, 4: 0.5, 3: 0.4, 2: 0.3}
"""How far down, by bits: the fewer codes there are, the more clipping pays."""
CANDIDATES = 32
"""Candidate ranges of an input, spaced evenly in their logarithm."""
MARGIN = 1.5
"""The largest candidate over the range that was seen: other images go beyond it."""
REACH = {8: 1.5, 6: 8.0, 4: 32.0}
"""The largest candidate over the smallest, by bits: finer codes than those of eight bits gain little, and clip what other
images need."""
SMOOTHINGS = (0.25, 0.5, 0.75)
"""Shares of a channel's range that are moved from the input into the weights (alpha of SmoothQuant)."""


def search_weight_scale(weight: Tensor, importance: Tensor, bits: int) -> Tensor:
    """The scale [O] of each output channel of `weight` [O, I, taps] that loses least; negative where that is better.

    The loss is the squared rounding error weighted by `importance` [I], the mean square of the input channel: the error at
    the layer's output where input channels are uncorrelated. There is one more negative code than positive ones, and a
    negative scale gives it to the positive weights.
    """
    largest = weight.abs().amax((1, 2)).clamp(min=torch.finfo(torch.float32).tiny * 2**bits)
    best, best_loss = largest / code_range(bits)[1], torch.full_like(largest, torch.inf)
    for shrink in torch.linspace(1.0, SMALLEST_SHRINK[bits], SHRINKS):
        for sign in (1, -1):
            scale = sign * largest * shrink / code_range(bits)[1]
            error = quantize_dequantize(weight, scale[:, None, None], bits) - weight
            loss = (error.square().sum(2) * importance).sum(1)
            best, best_loss = torch.where(loss < best_loss, scale, best), torch.minimum(loss, best_loss)
    return best


def search_group_scales(weight: Tensor, importance: Tensor, bits: int, group_size: int) -> Tensor:
    """Scales [O, G] of groups of `group_size` columns of `weight` [O, I, taps] flattened; the last group may be short."""
    rows, _, taps = weight.shape
    columns = weight.flatten(1)
    short = -columns.shape[1] % group_size
    groups = torch.nn.functional.pad(columns, (0, short)).unflatten(1, (-1, group_size))
    heavy = torch.nn.functional.pad(importance.repeat_interleave(taps), (0, short)).unflatten(0, (-1, group_size))
    found = [search_weight_scale(groups[:, i, :, None], heavy[i], bits) for i in range(groups.shape[1])]
    return torch.stack(found, 1).view(rows, -1)


def search_smoothing(weight: Tensor, seen: LayerInput, bits: tuple[int, int], asymmetric: bool) -> Tensor:
    """What each input channel [C] is multiplied by before rounding, and its weights divided by; ones where that is best.

    Channels with large inputs are made smaller at the cost of larger weights (Xiao et al. 2023, arXiv 2211.10438, eq. 4);
    how much is what loses least at the layer's output, over both roundings. How large the inputs of a channel are is told
    by their mean square, not by their largest, which other images exceed in one channel or another.
    """
    inputs = seen.second_moment.sqrt().clamp(min=1e-5)
    weights = weight.abs().amax((0, 2)).clamp(min=1e-5)
    candidates = [torch.ones_like(inputs)]
    for alpha in SMOOTHINGS:
        smoothing = weights ** (1 - alpha) / inputs**alpha
        candidates.append(smoothing / smoothing.log().mean().exp())
    losses = [_rounding_loss(weight, seen, candidate, bits, asymmetric) for candidate in candidates]
    return candidates[losses.index(min(losses))]


def _rounding_loss(
    weight: Tensor, seen: LayerInput, smoothing: Tensor, bits: tuple[int, int], asymmetric: bool
) -> float:
    """Expected squared error at the output once both the weights and the inputs are rounded."""
    smoothed = weight / smoothing[None, :, None]
    scale = search_weight_scale(smoothed, seen.second_moment * smoothing.square(), bits[0])
    error = quantize_dequantize(smoothed, scale[:, None, None], bits[0]) - smoothed
    lost = float((error.square().sum((0, 2)) * seen.second_moment * smoothing.square()).sum())
    heavy = smoothed.square().sum((0, 2))
    return lost + min(
        float(range_errors(seen.rows * smoothing, heavy, grid, bits[1]).min())
        for grid in range_candidates(seen, smoothing, bits[1], asymmetric)
    )


def range_candidates(seen: LayerInput, smoothing: Tensor, bits: int, asymmetric: bool) -> list[RangeCandidates]:
    """Candidates for rounding a smoothed input, from more than its range downwards: symmetric ones, and on demand others."""
    low, high = (seen.low * smoothing).min(), (seen.high * smoothing).max()
    shrinks = MARGIN * torch.logspace(0, -1, CANDIDATES, base=REACH[bits])
    first, last = code_range(bits)
    symmetric = RangeCandidates(torch.maximum(-low, high).clamp(min=1e-8) * shrinks / last, None)
    if not asymmetric:
        return [symmetric]
    scale = (high - low).clamp(min=1e-8) * shrinks / (last - first)
    zero_point = (first - low * shrinks / scale).round().clamp(first, last)
    return [symmetric, RangeCandidates(scale, zero_point)]


def choose_steps(errors: Tensor) -> tuple[Tensor, bool]:
    """One candidate a step [S] from `errors` [2, S, K], and whether the steps really differ.

    Steps are chosen on the first half, smoothed with their neighbours; where that does not beat a single candidate on the
    second half, all steps get the single one.
    """
    chosen, evaluated = errors
    steps = torch.arange(chosen.shape[0])
    single = chosen.sum(0).argmin().expand(len(steps))
    each = _smooth(chosen).argmin(1)
    differs = bool(evaluated[steps, each].sum() < evaluated[steps, single].sum())
    return (each if differs else single).clone(), differs


def _smooth(errors: Tensor) -> Tensor:
    """Each step [S, K] averaged with the steps beside it, which see nearly the same inputs."""
    before = torch.cat([errors[:1], errors[:-1]])
    after = torch.cat([errors[1:], errors[-1:]])
    return (before + 2 * errors + after) / 4
