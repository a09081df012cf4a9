"""Number formats: from values to codes and back."""

from __future__ import annotations

import torch
from torch import Tensor

FP8_MAX = 448.0
"""Largest value of float8_e4m3fn."""


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest signed code of `bits` bits."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def quantize(values: Tensor, scale: Tensor, bits: int, zero_point: Tensor | None = None) -> Tensor:
    """Codes int8 of float `values`: rounded half to even, moved by `zero_point`, clipped; `scale` (float32) broadcasts.

    The division is done in float32, so that every engine gets the same code from the same value.
    """
    low, high = code_range(bits)
    # A division gives a new tensor, so the rest may work in place.
    rounded = torch.div(values.float(), scale).round_()
    if zero_point is not None:
        rounded += zero_point
    return rounded.clamp_(low, high).to(torch.int8)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Float32 values of integer codes; `scale` and `zero_point`, the code of 0, broadcast against them."""
    return (codes.float() if zero_point is None else codes.float() - zero_point) * scale


def quantize_dequantize(values: Tensor, scale: Tensor, bits: int, zero_point: Tensor | None = None) -> Tensor:
    """`values` after quantizing and dequantizing."""
    low, high = code_range(bits)
    codes = torch.div(values, scale).round_()
    if zero_point is None:
        return codes.clamp_(low, high).mul_(scale)
    # Clipping the codes without z is the same, and exact: (clip(r + z) - z) = clip(r, low - z, high - z).
    return codes.clamp_(low - zero_point, high - zero_point).mul_(scale)


def dequantize_groups(codes: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """Float32 values [N, K] of integer codes whose rows have one of `scale` [N, ceil(K / group_size)] a group."""
    return dequantize(codes, spread_groups(scale, group_size, codes.shape[1]))


def spread_groups(scale: Tensor, group_size: int, columns: int) -> Tensor:
    """The scale of every column [N, columns], from one a group [N, ceil(columns / group_size)]."""
    return scale.repeat_interleave(group_size, dim=1)[:, :columns]


def to_fp8(values: Tensor, scale: Tensor) -> Tensor:
    """float8_e4m3fn of float `values` / `scale`, rounded half to even and clipped; `scale` (float32) broadcasts."""
    return torch.div(values.float(), scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def scale_sums(sums: Tensor, activation_scale: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Float32 output [..., N] of a layer from sums of products of codes, its scales [1] and [N], and its bias [N]."""
    # A product is a new tensor, so the sum may work in place.
    output = sums * (activation_scale * weight_scale)
    return output if bias is None else output.add_(bias)
