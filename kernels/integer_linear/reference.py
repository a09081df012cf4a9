"""The truth of `integer_linear`, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import activate
from ..integer_matmul import integer_matmul
from ..packing import unpack_codes
from ..quantization import dequantize, dequantize_groups, scale_sums


def integer_linear_reference(
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
    """y = act(s_x s_w ((X - z) W) + b) + r, the product in int32, or in float32 where groups of columns have scales."""
    rows = codes.reshape(codes.shape[:-1].numel(), codes.shape[-1])
    weights = unpack_codes(weight, rows.shape[1], weight_bits)
    if group_size == 0:
        sums, scale = integer_matmul(rows, weights, zero_point), weight_scale
    else:
        groups = dequantize_groups(weights, weight_scale, group_size)
        sums, scale = dequantize(rows, torch.ones(()), zero_point) @ groups.t(), weight_scale.new_ones(())
    output = activate(scale_sums(sums, activation_scale.view(-1, 1), scale, bias), activation)
    output = output if residual is None else output + residual.reshape(output.shape).float()
    return output.to(dtype).view(*codes.shape[:-1], output.shape[-1])
