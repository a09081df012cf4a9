"""The truth of `lora_linear`, in torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..weight_only_linear.reference import weight_only_linear_reference


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    branch_scale: float,
    weight_bits: int,
    group_size: int,
) -> Tensor:
    """y = x W s_w + b + (x A^T) B^T s, the branch in float32 (Hu et al. 2021, arXiv 2106.09685, equation 3)."""
    main = weight_only_linear_reference(x, weight, weight_scale, bias, weight_bits, group_size)
    low = F.linear(x.float(), down.to(x.dtype).float()) * branch_scale
    return (main.float() + F.linear(low, up.to(x.dtype).float())).to(x.dtype)
