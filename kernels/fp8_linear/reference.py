"""The truth of `fp8_linear`, in torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..quantization import scale_sums, to_fp8


def fp8_linear_reference(
    x: Tensor, weight: Tensor, weight_scale: Tensor, activation_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """y = s_x s_w (fp8(x / s_x) W) + b, the product summed in float32 (see `fp8_linear` for the shapes)."""
    scale = activation_scale.view(-1, 1)
    sums = F.linear(to_fp8(x.reshape(x.shape[:-1].numel(), x.shape[-1]), scale).float(), weight.float())
    return scale_sums(sums, scale, weight_scale, bias).to(x.dtype).view(*x.shape[:-1], len(weight))
