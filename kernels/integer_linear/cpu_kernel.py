"""What computes `integer_linear` on a CPU: C++ in one call, or the reference where there is none."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import activate
from ..cpu import compute_linear, computes
from .reference import integer_linear_reference


def launch(
    codes: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    activation_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    weight_bits: int,
    group_size: int,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """Compute `integer_linear`; its arguments are known to fit."""
    tensors = (weight_scale, activation_scale, zero_point, bias)
    if group_size or not computes(dtype):
        return integer_linear_reference(codes, weight, *tensors, residual, weight_bits, group_size, activation, dtype)
    if activation == "none":
        return compute_linear(codes, weight, *tensors, residual, dtype=dtype, weight_bits=weight_bits)
    output = activate(
        compute_linear(codes, weight, *tensors, None, dtype=torch.float32, weight_bits=weight_bits), activation
    )
    return (output if residual is None else output + residual.float()).to(dtype)
