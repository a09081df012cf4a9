"""Two-dimensional convolution on float8 weights and float8 activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_fp8, conv2d_depth
from ..library import define_op
from ..windows import empty_output
from .reference import fp8_conv2d_reference

__all__ = ["fp8_conv2d"]


def fp8_conv2d(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    activation_scale: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """`x` [B, C, H, W] convolved with float8 weights: [B, O, H', W'] in the dtype of `x`, zero padding, one group.

    `weight` is float8_e4m3fn [O, C*kh*kw]; the other tensors are those of `fp8_linear`, with N = O. Raises ValueError
    naming what does not fit.
    """
    depth = conv2d_depth(x, kernel_size, stride, padding, dilation)
    check_fp8(depth, weight, weight_scale, activation_scale, bias)
    return torch.ops.diffpress.fp8_conv2d(
        x,
        weight,
        weight_scale,
        activation_scale,
        bias,
        list(kernel_size),
        list(stride),
        list(padding),
        list(dilation),
    )


def _fake(x: Tensor, weight: Tensor, _s: Tensor, _a: Tensor, _bias: Tensor | None, *geometry: Any) -> Tensor:
    return empty_output(x, weight, *geometry)


define_op(__name__, fp8_conv2d_reference, _fake, on_gpu=None)
