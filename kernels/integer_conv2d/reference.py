"""The truth of `integer_conv2d`, in torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..activations import activate
from ..integer_matmul import integer_matmul
from ..packing import unpack_codes
from ..quantization import scale_sums
from ..windows import output_size, windows


def integer_conv2d_reference(
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
    """y = act(s_x s_w ((X - z) * W) + b) + r, the products of each window summed in int32."""
    size, zero = output_size(codes.shape[1:3], kernel_size, stride, padding, dilation), 0
    if zero_point is not None:
        zero = int(zero_point)
    rows = windows(codes.permute(0, 3, 1, 2), zero, kernel_size, stride, padding, dilation)
    weights = unpack_codes(weight, rows.shape[1], weight_bits)
    weights = weights.view(len(weight), codes.shape[3], -1).transpose(1, 2).reshape(len(weight), -1)
    sums = integer_matmul(rows, weights, zero_point)
    output = activate(scale_sums(sums, activation_scale, weight_scale, bias), activation)
    output = output.view(len(codes), *size, len(weight))
    return (output if residual is None else output + residual.float()).to(dtype)
