"""Two-dimensional convolution on integer weights, computed in floats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..checks import check_weight_only, conv2d_depth
from ..library import define_op
from ..windows import empty_output
from .reference import weight_only_conv2d_reference

__all__ = ["weight_only_conv2d"]


def weight_only_conv2d(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    weight_bits: int,
    group_size: int,
) -> Tensor:
    """`x` [B, C, H, W] convolved with integer weights: [B, O, H', W'], computed in the dtype of `x`, one group of channels.

    `weight` [O, ...] is the kernel packed from [O, C*kh*kw] (see `pack_codes`); `weight_scale` and `bias` are those of
    `weight_only_linear`, with N = O and K = C*kh*kw. Raises ValueError naming what does not fit.
    """
    return _operation(
        x,
        weight,
        weight_scale,
        bias,
        list(kernel_size),
        list(stride),
        list(padding),
        list(dilation),
        weight_bits,
        group_size,
    )


def _fake(x: Tensor, weight: Tensor, _scale: Tensor, _bias: Tensor | None, *rest: Any) -> Tensor:
    return empty_output(x, weight, *rest[:4])


def _check(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, *rest: Any) -> None:
    *geometry, weight_bits, group_size = rest
    check_weight_only(conv2d_depth(x, *geometry), weight, scale, bias, weight_bits, group_size)


_operation = define_op(__name__, weight_only_conv2d_reference, _fake, check=_check)
