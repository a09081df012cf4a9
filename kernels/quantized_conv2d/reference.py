"""The truth of `quantized_conv2d`, in torch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..integer_matmul import integer_matmul
from ..packing import unpack_codes
from ..quantization import quantize, scale_sums
from ..windows import output_size, windows


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
    height, width = output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    codes = quantize(x, activation_scale, activation_bits, zero_point)
    rows = windows(codes, 0 if zero_point is None else int(zero_point), kernel_size, stride, padding, dilation)
    weights = unpack_codes(weight, rows.shape[1], weight_bits)
    weights = weights.view(len(weight), x.shape[1], -1).transpose(1, 2).reshape(len(weight), -1)
    output = scale_sums(integer_matmul(rows, weights, zero_point), activation_scale, weight_scale, bias)
    return output.view(x.shape[0], height, width, len(weight)).permute(0, 3, 1, 2).contiguous().to(x.dtype)
