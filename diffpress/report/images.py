"""Images that stand inside the page: each pair, and a map of where the two differ."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from diffpress.calibration.conditions import Condition

from ..pairs import Pairs
from .formatting import IDENTICAL_DB, decibels

SHOWN = 8
LARGEST = 512
"""Longer side of an embedded image; larger ones are averaged down."""
LOSSLESS = 128
"""Up to this side images are stored as PNG and enlarged with visible pixels; above it as JPEG."""
JPEG_QUALITY = 80
FACTORS = (1, 2, 5, 10, 20, 50, 100)
ROUNDING = 1e-4
BRIGHT = 0.99
"""Share of the differences that must stay within the colour scale."""
SCALE = ((6, 7, 20), (51, 18, 92), (120, 32, 113), (186, 55, 84), (237, 105, 37), (252, 178, 24), (252, 255, 190))
"""Colours from no difference to the most, even steps, each brighter than the last."""


@dataclass(frozen=True)
class Shown:
    """One pair as the page shows it; images are data URLs."""

    title: str
    rank: str
    seed: int
    score: str
    """PSNR in words."""
    reference: str
    candidate: str
    difference: str


@dataclass(frozen=True)
class Gallery:
    """The pairs shown, worst first, and what their difference maps mean."""

    pairs: list[Shown]
    count: int
    factor: int
    width: int
    height: int
    pixelated: bool
    downscaled: bool
    scale: list[str]
    """CSS colours of the difference maps, from none to the most."""


def gallery(pairs: Pairs) -> Gallery:
    """Up to SHOWN of `pairs`, spread over the ranking from the worst to the best."""
    ranking = sorted(range(len(pairs.psnr_db)), key=lambda i: (not math.isnan(pairs.psnr_db[i]), pairs.psnr_db[i]))
    ranks = spread(len(ranking), SHOWN)
    chosen = [ranking[rank] for rank in ranks]
    differences = [shrink(difference(pairs.reference[i], pairs.candidate[i])) for i in chosen]
    factor = amplification(differences)
    height, width = pairs.reference.shape[-2:]
    return Gallery(
        [
            _shown(pairs, i, rank_words(rank, len(ranking)), factor, change)
            for i, rank, change in zip(chosen, ranks, differences, strict=True)
        ],
        len(ranking),
        factor,
        width,
        height,
        max(height, width) <= LOSSLESS,
        max(height, width) > LARGEST,
        [f"rgb({r} {g} {b})" for r, g, b in SCALE],
    )


def spread(count: int, most: int) -> list[int]:
    """Up to `most` of the numbers below `count`, evenly apart, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def rank_words(rank: int, count: int) -> str:
    """Where a pair stands; rank 0 is the worst."""
    if count == 1:
        return "the only pair"
    if rank == 0:
        return f"worst of {count}"
    return f"best of {count}" if rank == count - 1 else f"rank {rank + 1} of {count}"


def title(condition: Condition) -> str:
    """What was asked for, in words."""
    if not condition.text:
        return "no prompt"
    return f"class {condition.text}" if condition.text.isdecimal() else f"“{condition.text}”"


def score(psnr_db: float) -> str:
    """The PSNR of one pair in words."""
    return "equal" if psnr_db >= IDENTICAL_DB else f"{decibels(psnr_db)} dB"


def difference(reference: Tensor, candidate: Tensor) -> Tensor:
    """[1, H, W]: the largest absolute difference of the channels of two images [C, H, W]."""
    return (candidate.float() - reference.float()).nan_to_num(nan=1.0).abs().amax(0, keepdim=True)


def amplification(differences: list[Tensor]) -> int:
    """The largest of FACTORS that keeps nearly all `differences` at or below 1."""
    values = torch.cat([value.flatten() for value in differences]).sort().values
    bright = float(values[min(len(values) - 1, int(BRIGHT * len(values)))])
    return max(factor for factor in FACTORS if factor == 1 or factor * bright <= 1 + ROUNDING)


def colour(values: Tensor) -> Tensor:
    """[3, H, W] in 0..1: `values` [1, H, W] in 0..1 on the colour scale."""
    scale = torch.tensor(SCALE) / 255
    place = values[0].clamp(0, 1) * (len(SCALE) - 1)
    lower = place.long().clamp(max=len(SCALE) - 2)
    share = (place - lower)[..., None]
    return (scale[lower] * (1 - share) + scale[lower + 1] * share).permute(2, 0, 1)


def shrink(image: Tensor) -> Tensor:
    """`image` [C, H, W] averaged down to at most LARGEST on its longer side."""
    height, width = image.shape[-2:]
    ratio = LARGEST / max(height, width)
    if ratio >= 1:
        return image.float()
    return adaptive_avg_pool2d(image.float(), (max(1, round(height * ratio)), max(1, round(width * ratio))))


def data_url(image: Tensor) -> str:
    """`image` [C, H, W] in 0..1, C 1 or 3, as a data URL."""
    pixels = (shrink(image).nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    drawn = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    buffer = io.BytesIO()
    if max(drawn.size) <= LOSSLESS:
        drawn.save(buffer, "PNG", optimize=True)
    else:
        drawn.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    kind = "png" if max(drawn.size) <= LOSSLESS else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _shown(pairs: Pairs, index: int, rank: str, factor: int, change: Tensor) -> Shown:
    condition = pairs.conditions[index]
    return Shown(
        title(condition),
        rank,
        condition.seed,
        score(pairs.psnr_db[index]),
        data_url(pairs.reference[index]),
        data_url(pairs.candidate[index]),
        data_url(colour(factor * change)),
    )
