"""Two-dimensional convolution of codes: integer weights, inputs that are integers already, and what follows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..fused_checks import check_integer_conv2d
from ..library import define_op
from ..windows import output_size
from .reference import integer_conv2d_reference

__all__ = ["integer_conv2d"]


def integer_conv2d(
    codes: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    activation_scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    weight_bits: int = 8,
    activation: str = "none",
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """act(int8 `codes` [B, H, W, C] convolved with integer weights + bias) + residual: [B, H', W', O] in `dtype`.

    `weight` [O, ...] is the kernel packed from [O, C*kh*kw] (see `pack_codes`), the padding is the code of 0: `zero_point`
    [1], an int32. `weight_scale` is float32 [O], `activation_scale` float32 [1], `bias` [O]; `residual` has the form of the
    output, `activation` is one of CONV_ACTIVATIONS. Raises ValueError naming what does not fit.
    """
    check_integer_conv2d(
        codes,
        weight,
        weight_scale,
        activation_scale,
        zero_point,
        bias,
        residual,
        kernel_size,
        stride,
        padding,
        dilation,
        weight_bits,
        activation,
        dtype,
    )
    return torch.ops.diffpress.integer_conv2d(
        codes,
        weight,
        weight_scale,
        activation_scale,
        zero_point,
        bias,
        residual,
        list(kernel_size),
        list(stride),
        list(padding),
        list(dilation),
        weight_bits,
        activation,
        dtype,
    )


def _fake(codes: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    size = output_size(codes.shape[1:3], *rest[5:9])
    return codes.new_empty((codes.shape[0], *size, weight.shape[0]), dtype=rest[-1])


define_op(__name__, integer_conv2d_reference, _fake, on_cpu="cpu_kernel")
