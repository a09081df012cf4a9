"""The truth of `quantized_linear`, in torch."""

from __future__ import annotations

from torch import Tensor

from ..integer_matmul import integer_matmul
from ..packing import unpack_int4
from ..quantization import quantize


def quantized_linear_reference(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    activation_scale: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    activation_bits: int,
) -> Tensor:
    """y = s_x s_w (Q(x) W) + b, the product summed in int32 (see `quantized_linear` for the shapes)."""
    codes = quantize(x, activation_scale, activation_bits).reshape(x.shape[:-1].numel(), x.shape[-1])
    weights = weight if weight_bits == 8 else unpack_int4(weight, x.shape[-1])
    output = integer_matmul(codes, weights).float() * (activation_scale * weight_scale)
    if bias is not None:
        output = output + bias.float()
    return output.to(x.dtype).view(*x.shape[:-1], len(weight))
