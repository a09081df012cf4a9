"""How far a candidate's images are from the reference's, pair by pair."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

SMALLEST_ERROR = 1e-10
"""Mean squared error taken for equal images: 100 dB."""
WINDOW = 11
"""Pixels a side that SSIM looks at together."""


def psnr_db(images: Tensor, reference: Tensor) -> Tensor:
    """PSNR [N] in dB of images [N, C, H, W] in 0..1."""
    error = (images - reference).square().mean((1, 2, 3)).clamp(min=SMALLEST_ERROR)
    return -10 * torch.log10(error)


def geometric_mean_error(output: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """Geometric mean over images [N, ...] of their mean squared error, `least` at the least: no single one decides, as in a
    mean of decibels.
    """
    errors = (output - expected).square().flatten(1).mean(1)
    return float(errors.clamp(min=least).log().mean().exp())


def ssim(images: Tensor, reference: Tensor) -> float:
    """Mean structural similarity of images [N, C, H, W] in 0..1 (Wang et al. 2004); small ones by a flat window that fits."""
    side = min(images.shape[-2:])
    window = {} if side >= WINDOW else {"gaussian_kernel": False, "kernel_size": side - 1 + side % 2}
    value = structural_similarity_index_measure(images, reference, data_range=1.0, **window)
    assert isinstance(value, Tensor)
    return float(value)
