"""The truth of `group_norm_silu_quantize`, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import activate
from ..quantization import quantize


def group_norm_silu_quantize_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation_scale: Tensor,
    zero_point: Tensor | None,
    smoothing: Tensor | None,
    groups: int,
    eps: float,
    activation: str,
    bits: int,
) -> Tensor:
    """Q(act(GroupNorm(x)) * smoothing), with the channels last (Wu and He 2018, arXiv 1803.08494)."""
    if x.numel() == 0:
        return x.new_empty((len(x), *x.shape[2:], x.shape[1]), dtype=torch.int8)
    value = activate(torch.group_norm(x.float(), groups, weight.float(), bias.float(), eps), activation)
    value = value if smoothing is None else value * smoothing.float()[:, None, None]
    return quantize(value, activation_scale, bits, zero_point).permute(0, 2, 3, 1).contiguous()
