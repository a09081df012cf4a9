"""The truth of `quantized_linear`, in torch."""

from __future__ import annotations

from torch import Tensor

from ..integer_linear.reference import integer_linear_reference
from ..quantization import quantize


def quantized_linear_reference(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    activation_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    weight_bits: int,
    activation_bits: int,
) -> Tensor:
    """y = s_x s_w ((Q(x) - z) W) + b, the product summed in int32 (see `quantized_linear` for the shapes)."""
    codes = quantize(x, activation_scale, activation_bits, zero_point)
    return integer_linear_reference(
        codes, weight, weight_scale, activation_scale, zero_point, bias, None, weight_bits, 0, "none", x.dtype
    )
