"""Two-dimensional convolution on integer weights and integer activations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
    depth = x.shape[1] * kernel_size[0] * kernel_size[1]
    expected = (torch.int8, depth) if weight_bits == 8 else (torch.uint8, (depth + 1) // 2)
    if weight.ndim != 2 or (weight.dtype, weight.shape[1]) != expected:
        shape, dtype = tuple(weight.shape), weight.dtype
        raise ValueError(f"weight must be {expected[0]} [O, {expected[1]}] at {weight_bits} bits, got {dtype} {shape}")
    if weight_scale.shape != weight.shape[:1]:
        raise ValueError(f"weight_scale must be [{len(weight)}], got {tuple(weight_scale.shape)}")
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


@torch.library.custom_op("diffpress::quantized_conv2d", mutates_args=())
def _quantized_conv2d(
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
    return quantized_conv2d_reference(
        x,
        weight,
        weight_scale,
        activation_scale,
        bias,
        kernel_size,
        stride,
        padding,
        dilation,
        weight_bits,
        activation_bits,
    )


@_quantized_conv2d.register_fake
def _(
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
    size = output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    return x.new_empty((x.shape[0], weight.shape[0], *size))
