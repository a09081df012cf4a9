"""The truth of `block_sparse_linear`, in torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..integer_matmul import integer_matmul
from ..quantization import scale_sums
from .pack import unpack_blocks


def block_sparse_linear_reference(
    x: Tensor,
    values: Tensor,
    column_index: Tensor,
    row_pointer: Tensor,
    weight_scale: Tensor | None,
    activation_scale: Tensor | None,
    bias: Tensor | None,
    outputs: int,
    dtype: torch.dtype,
) -> Tensor:
    """y = x W + b in float32, or s_x s_w (X W) + b with the product in int32 (see `block_sparse_linear` for the shapes)."""
    weight = unpack_blocks(values, column_index, row_pointer, outputs, x.shape[-1])
    if weight_scale is None or activation_scale is None:
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(dtype)
    sums = integer_matmul(x.reshape(x.shape[:-1].numel(), x.shape[-1]), weight.contiguous())
    output = scale_sums(sums, activation_scale.view(-1, 1), weight_scale, bias)
    return output.to(dtype).view(*x.shape[:-1], outputs)
