"""Two-dimensional convolution on integer weights and integer activations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_packed
from .reference import output_size, quantized_conv2d_reference

__all__ = ["quantized_conv2d"]


def quantized_conv2d(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    activation_scale: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    weight_bits: int,
    activation_bits: int,
) -> Tensor:
    """`x` [B, C, H, W] convolved with integer weights: [B, O, H', W'] in the dtype of `x`, zero padding, one group.

    `weight` is the flattened kernel: int8 [O, C*kh*kw] at 8 bits, uint8 [O, ceil(C*kh*kw / 2)] at 4 (see `pack_int4`);
    `weight_scale` [O] and `activation_scale` [1] are float32, `bias` is [O]. Raises ValueError naming what does not fit.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x must be floating point [B, C, H, W], got {x.dtype} {list(x.shape)}")
    geometry = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    for name, pair in geometry.items():
        if len(pair) != 2:
            raise ValueError(f"{name} must be two numbers, got {list(pair)}")
    if min(output_size(x.shape[2:], **geometry)) < 1:
        raise ValueError(f"kernel_size {list(kernel_size)} reaches beyond x {list(x.shape)} padded by {list(padding)}")
    depth = x.shape[1] * kernel_size[0] * kernel_size[1]
    check_packed(depth, weight, weight_scale, activation_scale, bias, weight_bits, activation_bits)
    return torch.ops.diffpress.quantized_conv2d(
        x,
        weight,
        weight_scale,
        activation_scale,
        bias,
        list(kernel_size),
        list(stride),
        list(padding),
        list(dilation),
        weight_bits,
        activation_bits,
    )


_op = torch.library.custom_op("diffpress::quantized_conv2d", quantized_conv2d_reference, mutates_args=())


@_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    _weight_scale: Tensor,
    _activation_scale: Tensor,
    _bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *_: object,
) -> Tensor:
    size = output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    return x.new_empty((x.shape[0], weight.shape[0], *size))
