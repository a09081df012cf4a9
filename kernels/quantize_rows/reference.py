"""The truth of `quantize_rows`, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantization import code_range, quantize


def quantize_rows_reference(
    x: Tensor, scale: Tensor | None, zero_point: Tensor | None, bits: int
) -> tuple[Tensor, Tensor]:
    """Q(x) = clip(round(x / s) + z), with s = max |x| / (2^(bits - 1) - 1) of a row where it is not given."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    scales = row_scales(rows, bits) if scale is None else scale.clone()
    return quantize(rows, scales[:, None], bits, zero_point).view(x.shape), scales


def row_scales(rows: Tensor, bits: int) -> Tensor:
    """Float32 [M] that puts the largest magnitude of each of `rows` [M, K] at the largest code; 1 for a row of zeros."""
    return scales_for(rows.float().abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows)).float(), bits)


def scales_for(largest: Tensor, bits: int) -> Tensor:
    """Scales that put the `largest` magnitudes, float32, at the largest code; 1 where that is 0."""
    # By a tensor: torch divides by a number on a GPU as if it multiplied with the rounded inverse.
    scales = largest / torch.full_like(largest, code_range(bits)[1])
    return scales.where(scales > 0, 1)
