"""The truth of `quantized_conv2d`, in torch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..integer_conv2d.reference import integer_conv2d_reference
from ..quantization import quantize
from ..windows import memory_format


def quantized_conv2d_reference(
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
    """y = s_x s_w ((Q(x) - z) * W) + b, the products of each window summed in int32 (see `quantized_conv2d`)."""
    codes = quantize(x, activation_scale, activation_bits, zero_point).permute(0, 2, 3, 1)
    output = integer_conv2d_reference(
        codes, weight, weight_scale, activation_scale, zero_point, bias, None,
        kernel_size, stride, padding, dilation, weight_bits, "none", x.dtype,
    )  # fmt: skip
    return output.permute(0, 3, 1, 2).contiguous(memory_format=memory_format(x))
