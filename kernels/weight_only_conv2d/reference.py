"""The truth of `weight_only_conv2d`, in torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ..packing import unpack_codes
from ..processor import fast_dtype
from ..quantization import dequantize_groups


def weight_only_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    weight_bits: int,
    group_size: int,
) -> Tensor:
    """y = x * (W s_w) + b, the weights cast to the dtype of x (see `weight_only_conv2d`, and `fast_dtype`)."""
    dtype, shape = fast_dtype(x), (len(weight), x.shape[1], *kernel_size)
    codes = unpack_codes(weight, shape[1] * shape[2] * shape[3], weight_bits)
    weights = dequantize_groups(codes, weight_scale, group_size).to(x.dtype).to(dtype).view(shape)
    offset = None if bias is None else bias.to(x.dtype).to(dtype)
    return F.conv2d(x.to(dtype), weights, offset, stride, padding, dilation).to(x.dtype).contiguous()
