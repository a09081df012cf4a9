"""What is added to the weight of a packed layer is rounded to its codes again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffpress.kernels import code_range, dequantize, pack_codes, quantize
from diffpress.kernels.quantization import FP8_MAX, to_fp8

if TYPE_CHECKING:
    from ..edits import Pack

SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)
"""Of the largest magnitude, that are tried as what the largest code stands for: with few bits clipping a little errs less."""
TINY = 1e-12
"""Scale of a group that is all zero."""


def packed_anew(values: Tensor, edit: Pack, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and scale, as `edit` stores them, of float `values` [rows, columns]; `scale` is the one that they had before."""
    if edit.float8:
        new = (values.abs().amax(1) / FP8_MAX).clamp(min=TINY)
        return to_fp8(values, new[:, None]), new
    groups = values.split(edit.group_size or values.shape[1], 1)
    found = [_rounded(*group, edit.weight_bits) for group in zip(groups, scale.view(len(values), -1).T, strict=True)]
    codes, scales = (torch.cat(part, 1) for part in zip(*found, strict=True))
    return pack_codes(codes, edit.weight_bits), scales.view(scale.shape)


def _rounded(values: Tensor, before: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes [rows, columns] and scales [rows, 1] of values that share a scale a row: of those tried, what errs least."""
    largest = values.abs().amax(1) / code_range(bits)[1]
    # The scale from before comes first: where nothing was added, nothing changes.
    tried = torch.stack([before, *(share * largest for share in SHARES)]).clamp(min=TINY)[..., None]
    errors = torch.stack([(dequantize(quantize(values, own, bits), own) - values).square().sum(1) for own in tried])
    scale = tried.gather(0, errors.argmin(0)[None, :, None])[0]
    return quantize(values, scale, bits), scale
