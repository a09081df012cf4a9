"""Norm over groups of channels, SiLU, and the codes that a convolution on integers takes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..fused_checks import check_group_norm
from ..library import define_op
from .reference import group_norm_silu_quantize_reference

__all__ = ["group_norm_silu_quantize"]


def group_norm_silu_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation_scale: Tensor,
    zero_point: Tensor | None = None,
    smoothing: Tensor | None = None,
    *,
    groups: int,
    eps: float = 1e-5,
    activation: str = "silu",
    bits: int = 8,
) -> Tensor:
    """int8 codes [B, H, W, C] of act(group_norm(x)) * smoothing for `x` [B, C, H, W], whichever way it lies in memory.

    `weight`, `bias` and `smoothing` are [C]; `activation_scale` is float32 [1], `zero_point` [1], the code of 0, an int32;
    `activation` is one of CONV_ACTIVATIONS. All of it is computed in float32. Raises ValueError naming what does not fit.
    """
    check_group_norm(x, weight, bias, activation_scale, zero_point, smoothing, groups, eps, activation, bits)
    return torch.ops.diffpress.group_norm_silu_quantize(
        x, weight, bias, activation_scale, zero_point, smoothing, groups, eps, activation, bits
    )


def _fake(x: Tensor, *_: object) -> Tensor:
    batch, channels, height, width = x.shape
    return x.new_empty((batch, height, width, channels), dtype=torch.int8)


define_op(__name__, group_norm_silu_quantize_reference, _fake)
