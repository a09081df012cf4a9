"""GPTQ: weights rounded column after column, the columns to come making up for the errors of those before.

Frantar et al. 2022, arXiv 2210.17323: for each row w of W [O, K] minimize (w - q) H (w - q)^T, H = E[x x^T], over q on the
row's grid. Rounding column j and moving the columns F that are not rounded yet by

    delta_F = - (w_j - quant(w_j)) / [H_F^-1]_jj . [H_F^-1]_j,F                                                   (eq. 2)

is the best that can be done for j. What H_F^-1 is after each column stands in the rows of one Cholesky factor U of
H^-1 = U^T U: [H_F^-1]_j,F / [H_F^-1]_jj = U_j,F / U_jj (section 3.3, step 3).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from diffpress.calibration.moments import in_blocks
from diffpress.calibration.observe import layer_matrix
from diffpress.kernels import code_range

from .quantized_layer import QuantizedLayer, broadcast_scale

LAMBDA = 0.3
"""Share of the mean of H's diagonal that is added to it. The paper takes 0.01, for what is meant to be run on texts like
those that were recorded; other images are correlated less than the few that were."""
LAZY = 32
"""Columns whose errors reach the columns behind them in one product (the paper's B, section 3.3, step 2)."""


def gptq(layer: nn.Module, quantized: QuantizedLayer, h: Tensor) -> QuantizedLayer:
    """The same with other codes where weights are integers; scales stay. `h` [blocks, width, width] is of the layer's inputs.

    No code moves by more than one from the nearest, so that a weight stays what it was.
    """
    if quantized.format.float8:
        return quantized
    weight = layer_matrix(layer)
    if quantized.smoothing is not None:
        weight = weight / quantized.smoothing[None, :, None]
        h = smoothed_moments(h, quantized.smoothing, weight.shape[2])
    s = broadcast_scale(quantized.weight_scale, quantized.codes.shape, quantized.format.group_size).flatten(1)
    codes = round_columns(weight.flatten(1), s, h, quantized.format.weight_bits)
    return replace(quantized, codes=codes.view(quantized.codes.shape))


def smoothed_moments(h: Tensor, smoothing: Tensor, taps: int) -> Tensor:
    """E[(d x) (d x)^T] = d d^T * E[x x^T], block by block, for inputs whose channels are multiplied by `smoothing` [C]."""
    d = in_blocks(smoothing.repeat_interleave(taps)[None]).squeeze(1)
    return h * d[:, :, None] * d[:, None, :]


def round_columns(weight: Tensor, s: Tensor, h: Tensor, bits: int) -> Tensor:
    """int8 codes [O, K] of `weight` [O, K] on the grid s q (`s` broadcasts against it), for inputs of second moments `h`.

    `h` is [blocks, width, width]: blocks of columns do not see each other. Columns with large inputs go first.
    """
    columns = weight.shape[1]
    order = h.diagonal(dim1=1, dim2=2).argsort(1, descending=True)
    # [blocks, width, O]: what is worked on at a time, a column of W, lies together.
    blocks = (in_blocks(weight), in_blocks(s.expand_as(weight), 1.0))
    w, s = (each.transpose(1, 2).take_along_dim(order[:, :, None], 1) for each in blocks)
    u = inverse_factor(h.take_along_dim(order[:, :, None], 1).take_along_dim(order[:, None, :], 2))
    q = (w / s).round_()
    least, most = (q - 1).clamp_(*code_range(bits)), (q + 1).clamp_(*code_range(bits))
    for i in range(0, w.shape[1], LAZY):
        lazy = slice(i, min(i + LAZY, w.shape[1]))
        errors = torch.empty_like(w[:, lazy])
        columns_of = zip(*(each[:, lazy].unbind(1) for each in (w, s, q, least, most)), errors.unbind(1), strict=True)
        # In place and by few operations: they are many, and small.
        for j, (w_j, s_j, q_j, least_j, most_j, error) in enumerate(columns_of, i):
            torch.div(w_j, s_j, out=q_j).round_().clamp_(least_j, most_j)
            torch.addcmul(w_j, q_j, s_j, value=-1, out=error).div_(u[:, j, j, None])
            w[:, j + 1 : lazy.stop].addcmul_(u[:, j, j + 1 : lazy.stop, None], error[:, None], value=-1)
        w[:, lazy.stop :].baddbmm_(u[:, lazy, lazy.stop :].transpose(1, 2), errors, alpha=-1)
    codes = q.take_along_dim(order.argsort(1)[:, :, None], 1).to(torch.int8)
    return codes.flatten(0, 1)[:columns].T.contiguous()


def inverse_factor(h: Tensor) -> Tensor:
    """The upper triangle U with U^T U = (H + lambda mean(diag H) I)^-1, for each of `h` [blocks, width, width]."""
    h = h.clone()
    diagonal = h.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    # What is always fed zeros has any inverse.
    diagonal += (LAMBDA * mean).where(mean > 0, 1)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return torch.linalg.cholesky(inverse, upper=True)
