"""What computes `weight_only_conv2d` on a GPU: a Triton kernel writes the weights out, cuDNN does the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spreading import spread_floats


def launch(
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
    """Compute `weight_only_conv2d` on the device of its arguments, which are known to fit."""
    shape = torch.Size((len(weight), x.shape[1], *kernel_size))
    weights = spread_floats(weight, weight_scale, shape[1:].numel(), weight_bits, group_size, x.dtype).view(shape)
    # In the dtype of x, whatever autocast makes of products.
    with torch.autocast(x.device.type, enabled=False):
        return F.conv2d(x, weights, None if bias is None else bias.to(x.dtype), stride, padding, dilation).contiguous()
