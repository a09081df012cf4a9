"""The truth of `norm_modulate_quantize`, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantize_rows.reference import quantize_rows_reference


def norm_modulate_quantize_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation_scale: Tensor | None,
    zero_point: Tensor | None,
    norm: str,
    eps: float,
    bits: int,
) -> tuple[Tensor, Tensor]:
    """Q((x - mean) / sqrt(variance + eps) * w + b, times 1 + scale, plus shift); the RMS norm leaves the mean out."""
    value, channels = x.float(), x.shape[2:]
    weight, bias = (None if part is None else part.float() for part in (weight, bias))
    if norm == "layer":
        value = torch.layer_norm(value, channels, weight, bias, eps)
    else:
        value = torch.rms_norm(value, channels, weight, eps)
        value = value if bias is None else value + bias
    value = value if scale is None else value * (1 + scale.float())[:, None]
    value = value if shift is None else value + shift.float()[:, None]
    return quantize_rows_reference(value, activation_scale, zero_point, bits)
