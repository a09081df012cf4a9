"""How far a candidate's images are from the reference's, pair by pair."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from .calls import OutputKind
from .made import picture_of

SMALLEST_ERROR = 1e-10
"""Mean squared error taken for equal images: 100 dB."""
WINDOW = 11
"""Pixels a side that SSIM looks at together."""


MEASURES: dict[OutputKind, str] = {
    "image": "images",
    "video": "frames of videos",
    "audio": "spectrograms of sounds (decibels, 0 to -80), and snr_db of the waveforms",
    "array": "arrays, as shares of the reference's range",
}
"""What PSNR and SSIM are taken of."""


class Quality(NamedTuple):
    """How far N outputs are from the reference's."""

    psnr_db: list[float]
    ssim: float
    more: dict[str, float]
    """Other measures, which only some kinds have."""


def quality(kind: OutputKind, made: Tensor, reference: Tensor) -> Quality:
    """Of `made` [N, ...] of that kind (see `MEASURES`)."""
    if kind == "image":
        return Quality(psnr_db(made, reference).tolist(), ssim(made, reference), {})
    if kind == "video":
        frames = made.flatten(0, 1), reference.flatten(0, 1)
        return Quality(psnr_db(made.flatten(1, 2), reference.flatten(1, 2)).tolist(), ssim(*frames), {})
    pictures = [torch.stack([picture_of(kind, own) for own in side]) for side in (made, reference)]
    if kind == "audio":
        more = {"snr_db": float(snr_db(made, reference).mean())}
        return Quality(psnr_db(*pictures).tolist(), ssim(*pictures), more)
    flat = reference.flatten(1).float()
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    scale = (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    shares = [((own.flatten(1).float() - low) / scale)[:, None, None] for own in (made, reference)]
    return Quality(psnr_db(*shares).tolist(), ssim(*pictures), {})


def snr_db(sounds: Tensor, reference: Tensor) -> Tensor:
    """Signal-to-noise ratio [N] in dB of sounds [N, C, T]: energy of the reference over that of the difference."""
    noise = (sounds - reference).square().flatten(1).mean(1)
    signal = reference.square().flatten(1).mean(1).clamp(min=SMALLEST_ERROR)
    return 10 * torch.log10(signal / noise.clamp(min=SMALLEST_ERROR * signal))


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
