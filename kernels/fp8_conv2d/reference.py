"""The truth of `fp8_conv2d`, in torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ..quantization import scale_sums, to_fp8


def fp8_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    activation_scale: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """y = s_x s_w (fp8(x / s_x) * W) + b, the products of each window summed in float32 (see `fp8_conv2d`)."""
    kernel = weight.float().view(len(weight), x.shape[1], *kernel_size)
    sums = F.conv2d(to_fp8(x, activation_scale).float(), kernel, None, stride, padding, dilation)
    output = scale_sums(sums.movedim(1, -1), activation_scale, weight_scale, bias)
    return output.movedim(-1, 1).contiguous().to(x.dtype)
