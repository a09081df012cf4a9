"""Norm over the last axis, the modulation of adaptive norms, and codes, in one pass over the input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..fused_checks import check_norm_modulate
from ..library import define_op
from .reference import norm_modulate_quantize_reference

__all__ = ["norm_modulate_quantize"]


def norm_modulate_quantize(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation_scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    *,
    norm: str = "layer",
    eps: float = 1e-6,
    bits: int = 8,
) -> tuple[Tensor, Tensor]:
    """int8 codes of (norm(x) * weight + bias) * (1 + scale) + shift for `x` [B, T, C], and their scales.

    `norm` is one of NORMS; `weight` and `bias` are [C], `scale` and `shift` [B, C]. `activation_scale` is float32 [1] and
    comes back as it is, `zero_point` [1] an int32; without them each row gets its scale, as in `quantize_rows`: float32
    [B * T]. All of it is computed in float32. Raises ValueError naming what does not fit.
    """
    check_norm_modulate(x, weight, bias, scale, shift, activation_scale, zero_point, norm, eps, bits)
    return torch.ops.diffpress.norm_modulate_quantize(
        x, weight, bias, scale, shift, activation_scale, zero_point, norm, eps, bits
    )


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    rows = x.shape[0] * x.shape[1] if rest[4] is None else 1
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(rows, dtype=torch.float32)


define_op(__name__, norm_modulate_quantize_reference, _fake)
