"""The truth of `weight_only_linear`, in torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..packing import unpack_codes
from ..processor import fast_dtype
from ..quantization import dequantize_groups


def weight_only_linear_reference(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, weight_bits: int, group_size: int
) -> Tensor:
    """y = x W s_w + b, the weights cast to the dtype of x (see `weight_only_linear`, and `fast_dtype`)."""
    dtype, codes = fast_dtype(x), unpack_codes(weight, x.shape[-1], weight_bits)
    weights = dequantize_groups(codes, weight_scale, group_size).to(x.dtype).to(dtype)
    return F.linear(x.to(dtype), weights, None if bias is None else bias.to(x.dtype).to(dtype)).to(x.dtype)
