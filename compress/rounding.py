"""Rounding that can be trained through: the maths, knowing tensors only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffpress.calibration.observe import quantize_dequantize
from diffpress.kernels import code_range


def fake_quantize(values: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """s (clip(round(x / s) + z) - z) in float: `scale` and `zero_point` broadcast against `values`.

    Rounding passes gradients straight through, clipping stops them; the scale and the zero point get those of learned step
    sizes (Esser et al. 2020, arXiv 1902.08153, eq. 3; for z as in Bhalgat et al. 2020, arXiv 2004.09576, eq. 3).
    """
    result = _FakeQuantize.apply(values, scale, zero_point, bits)
    assert isinstance(result, Tensor)
    return result


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
        values, scale, zero_point = ctx.saved_tensors
        low, high = (edge if zero_point is None else edge - zero_point for edge in code_range(ctx.bits))
        # In place, and one after the other, since a weight may be large.
        ratio = values / scale
        clipped = ratio.round()
        inside = (clipped >= low) & (clipped <= high)
        clipped.clamp_(low, high)
        for_scale = for_zero = None
        if ctx.needs_input_grad[1]:
            # gradient * (clipped - ratio) where nothing was clipped, gradient * clipped elsewhere.
            for_scale = clipped.mul_(gradient).sub_(ratio.mul_(inside).mul_(gradient)).sum_to_size(scale.shape)
        del ratio, clipped
        for_values = gradient * inside
        if zero_point is not None and ctx.needs_input_grad[2]:
            for_zero = ((for_values - gradient) * scale).sum_to_size(zero_point.shape)
        return for_values, for_scale, for_zero, None
