"""What computes `quantized_conv2d` on a CPU: C++ in one call, or the reference where there is none."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..cpu import compute_conv2d, computes
from .reference import quantized_conv2d_reference


def launch(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    activation_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    weight_bits: int,
    activation_bits: int,
) -> Tensor:
    """Compute `quantized_conv2d`; its arguments are known to fit."""
    tensors, geometry = (weight_scale, activation_scale, zero_point, bias), (kernel_size, stride, padding, dilation)
    if not computes(x.dtype):
        return quantized_conv2d_reference(x, weight, *tensors, *geometry, weight_bits, activation_bits)
    output = compute_conv2d(
        x, weight, *tensors, None, geometry=geometry, dtype=x.dtype, weight_bits=weight_bits, bits=activation_bits
    )
    return output.permute(0, 3, 1, 2)
