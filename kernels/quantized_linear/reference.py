"""The truth of `quantized_linear`, in torch."""

from __future__ import annotations

from torch import Tensor

from ..integer_matmul import integer_matmul
from ..packing import unpack_codes
from ..quantization import quantize, scale_sums


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
    codes = quantize(x, activation_scale, activation_bits, zero_point).reshape(x.shape[:-1].numel(), x.shape[-1])
    sums = integer_matmul(codes, unpack_codes(weight, x.shape[-1], weight_bits), zero_point)
    output = scale_sums(sums, activation_scale, weight_scale, bias)
    return output.to(x.dtype).view(*x.shape[:-1], len(weight))
