"""What computes `quantized_linear` on a CPU: C++ in one call, or the reference where there is none."""

from __future__ import annotations

from torch import Tensor

from ..cpu import compute_linear, computes
from .reference import quantized_linear_reference


def launch(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    activation_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    weight_bits: int,
    activation_bits: int,
) -> Tensor:
    """Compute `quantized_linear`; its arguments are known to fit."""
    tensors = (weight_scale, activation_scale, zero_point, bias)
    if not computes(x.dtype):
        return quantized_linear_reference(x, weight, *tensors, weight_bits, activation_bits)
    return compute_linear(x, weight, *tensors, None, dtype=x.dtype, weight_bits=weight_bits, bits=activation_bits)
