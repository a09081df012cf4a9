"""Scales, zero points and smoothing by search: the maths of rounding to nearest, knowing tensors only.

Symbols: W [O, I, taps] a weight of O output and I input channels, s a scale, q = clip(round(W / s)) its codes, z a zero
point, H_jj = E[x_j^2] the importance [I] of input channel j.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffpress.calibration.observe import LayerInput, RangeCandidates, range_errors
from diffpress.kernels import code_range, quantize_dequantize

SHRINKS = {8: 16, 4: 40, 3: 48, 2: 56}
"""Candidate weight scales of either sign, from the largest weight downwards: 1.3 percent of the first apart."""
SMALLEST_SHRINK = {8: 0.8, 4: 0.5, 3: 0.4, 2: 0.3}
"""How far down, by bits: the fewer codes there are, the more clipping pays."""
CANDIDATES = {8: 8, 6: 32, 4: 32}
"""Candidate ranges of an input by bits, spaced evenly in their logarithm: 6 to 12 percent apart."""
MARGIN = 1.5
"""The largest candidate over the range that was seen: other images go beyond it."""
REACH = {8: 1.5, 6: 8.0, 4: 32.0}
"""The largest candidate over the smallest, by bits: finer codes than those of eight bits gain little, and clip what other
images need."""
ALPHAS = (0.25, 0.5, 0.75)
"""Shares of a channel's range that are moved from the input into the weights: the paper's alpha takes 0.5 for most models,
0.75 where inputs have the larger outliers."""
SMOOTHED_ROWS = 64
"""Output channels by which smoothing is chosen: what moves is the range of input channels, which they all share."""
CHUNK = 2**16
"""Weights that are searched at a time: with what is computed of them they stay in the processor's second cache."""


def search_weight_scale(weight: Tensor, importance: Tensor, bits: int) -> Tensor:
    """The scale s [O] of each output channel of `weight` [O, I, taps] that loses least; negative where that is better.

    The loss is sum_j H_jj |W_j - s q_j|^2, `importance` [I] being H_jj: the error at the layer's output where input channels
    are uncorrelated. There is one more negative code than positive ones, and a negative scale gives it to the positive
    weights.
    """
    columns, heavy = weight.flatten(1), importance.repeat_interleave(weight.shape[2])
    at_a_time = max(1, CHUNK // columns.shape[1])
    return torch.cat([_search_rows(part, heavy, bits) for part in columns.split(at_a_time)])


def _search_rows(w: Tensor, heavy: Tensor, bits: int) -> Tensor:
    """The same of rows [N, K] with the importance [K] of their columns."""
    low, high = code_range(bits)
    largest = w.abs().amax(1)
    # What has no finer scale rounds to zero by any.
    largest = largest.where(largest > torch.finfo(torch.float32).tiny * 2**bits, high)
    best, best_loss = largest / high, torch.full_like(largest, torch.inf)
    shrinks = torch.linspace(1.0, SMALLEST_SHRINK[bits], SHRINKS[bits], device=w.device)
    # As many candidates at a time as a chunk holds.
    for part in torch.stack([shrinks, -shrinks], 1).flatten().split(max(1, CHUNK // w.numel())):
        s = part[:, None] * largest / high
        error = torch.div(w, s[:, :, None]).round_().clamp_(low, high).mul_(s[:, :, None]).sub_(w)
        loss, index = (error.square_() @ heavy).min(0)
        s = s.gather(0, index[None])[0]
        best, best_loss = torch.where(loss < best_loss, s, best), torch.minimum(loss, best_loss)
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


def search_smoothing(weight: Tensor, layer_input: LayerInput, bits: tuple[int, int], asymmetric: bool) -> Tensor:
    """What each input channel [I] is multiplied by before rounding, and its weights divided by; ones where that is best.

    SmoothQuant (Xiao et al. 2023, arXiv 2211.10438): X W = (X diag(s)^-1) (diag(s) W), with

        s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)                                                               (eq. 4)

    and the alpha that loses least at the layer's output, over both roundings; what is returned is 1 / s. How large the
    inputs of a channel are is told by their mean square, not by their largest, which other images exceed in one channel or
    another. A common factor of all s_j changes nothing, so their geometric mean is one.
    """
    x = layer_input.second_moment.sqrt().clamp(min=1e-5)
    w = weight.abs().amax((0, 2)).clamp(min=1e-5)
    candidates = [torch.ones_like(x)]
    for alpha in ALPHAS:
        s = x**alpha / w ** (1 - alpha)
        candidates.append((s / s.log().mean().exp()).reciprocal())
    rows = weight[:: -(-len(weight) // SMOOTHED_ROWS)]
    losses = [_rounding_loss(rows, layer_input, candidate, bits, asymmetric) for candidate in candidates]
    return candidates[losses.index(min(losses))]


def _rounding_loss(
    weight: Tensor, layer_input: LayerInput, smoothing: Tensor, bits: tuple[int, int], asymmetric: bool
) -> float:
    """Expected squared error at the output once both the weights and the inputs are rounded."""
    smoothed = weight / smoothing[None, :, None]
    importance = layer_input.second_moment * smoothing.square()
    s = search_weight_scale(smoothed, importance, bits[0])
    error = quantize_dequantize(smoothed, s[:, None, None], bits[0]) - smoothed
    lost = float((error.square().sum((0, 2)) * importance).sum())
    squares = smoothed.square().sum((0, 2))
    return lost + min(
        float(range_errors(layer_input.rows * smoothing, squares, grid, bits[1]).min())
        for grid in range_candidates(layer_input, smoothing, bits[1], asymmetric)
    )


def range_candidates(layer_input: LayerInput, smoothing: Tensor, bits: int, asymmetric: bool) -> list[RangeCandidates]:
    """Candidates for rounding a smoothed input, from more than its range downwards: symmetric ones, and on demand others."""
    low, high = (layer_input.low * smoothing).min(), (layer_input.high * smoothing).max()
    shrinks = MARGIN * torch.logspace(0, -1, CANDIDATES[bits], base=REACH[bits])
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
