"""What computes `integer_conv2d` on a CPU: C++ in one call, or the reference where there is none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..activations import activate
from ..cpu import compute_conv2d, computes
from .reference import integer_conv2d_reference


def launch(
    codes: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    activation_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    weight_bits: int,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """Compute `integer_conv2d`; its arguments are known to fit."""
    tensors, geometry = (weight_scale, activation_scale, zero_point, bias), (kernel_size, stride, padding, dilation)
    if not computes(dtype):
        return integer_conv2d_reference(codes, weight, *tensors, residual, *geometry, weight_bits, activation, dtype)
    images = codes.permute(0, 3, 1, 2)
    if activation == "none":
        return compute_conv2d(
            images, weight, *tensors, residual, geometry=geometry, dtype=dtype, weight_bits=weight_bits
        )
    output = compute_conv2d(
        images, weight, *tensors, None, geometry=geometry, dtype=torch.float32, weight_bits=weight_bits
    )
    output = activate(output, activation)
    return (output if residual is None else output + residual.float()).to(dtype)
