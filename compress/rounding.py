"""Rounding that can be trained through: the maths of learned step sizes (LSQ), knowing tensors only.

Esser et al. 2020, arXiv 1902.08153, with the paper's symbols: v what is rounded, s the step size, -Q_N and Q_P the first and
the last code, v_bar = round(clip(v / s, -Q_N, Q_P)) the code and v_hat = v_bar s what it stands for (eq. 1 and 2). With a
zero point z (Bhalgat et al. 2020, arXiv 2004.09576) the same codes are shifted: -Q_N - z and Q_P - z take the edges' places.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffpress.kernels import code_range, quantize_dequantize


def fake_quantize(values: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """v_hat of `values` v, in float: the step size s, `scale`, and z, `zero_point`, broadcast against them.

    Rounding passes gradients straight through, clipping stops them (eq. 5). The step size gets

        dv_hat/ds = v_bar - v / s inside of the clipping range, -Q_N or Q_P beyond it                             (eq. 3)

    and the zero point -s beyond it, nothing inside (Bhalgat et al., eq. 3).
    """
    result = _FakeQuantize.apply(values, scale, zero_point, bits)
    assert isinstance(result, Tensor)
    return result


SMALLEST_HALF = 2.0**-20
"""Smaller scales keep float32: the numbers of float16 are 2^-24 apart there, and one could be more than 3 % off."""


def to_half(scale: Tensor) -> Tensor:
    """The nearest numbers that float16 has, in float32, with gradients straight through; what is out of its reach stays."""
    nearest = scale.detach().half().float()
    reached = (nearest.abs() >= SMALLEST_HALF) & nearest.isfinite()
    # The difference is exact, and so is the sum.
    return scale + torch.where(reached, nearest - scale.detach(), 0)


def straight_through_round(values: Tensor) -> Tensor:
    """Rounded half to even; the gradient is that of the identity."""
    return values + (values.round() - values).detach()


class _FakeQuantize(torch.autograd.Function):
    """Keeps its inputs only; codes are computed again on the way back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
        ctx.save_for_backward(values, scale, zero_point)
        ctx.bits = bits
        return quantize_dequantize(values, scale, bits, zero_point)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        v, s, z = ctx.saved_tensors
        first, last = (edge if z is None else edge - z for edge in code_range(ctx.bits))
        # In place, and one after the other, since a weight may be large.
        ratio = v / s
        v_bar = ratio.round()
        inside = (v_bar >= first) & (v_bar <= last)
        v_bar.clamp_(first, last)
        for_s = for_z = None
        if ctx.needs_input_grad[1]:
            # Eq. 3: gradient (v_bar - v / s) inside, gradient v_bar beyond, where v_bar is -Q_N or Q_P.
            for_s = v_bar.mul_(gradient).sub_(ratio.mul_(inside).mul_(gradient)).sum_to_size(s.shape)
        del ratio, v_bar
        for_v = gradient * inside
        if z is not None and ctx.needs_input_grad[2]:
            for_z = ((for_v - gradient) * s).sum_to_size(z.shape)
        return for_v, for_s, for_z, None
