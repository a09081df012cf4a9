"""How images lie in memory, and how kernels cut them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PixelTile(NamedTuple):
    """Pixels and channels that one program keeps in its registers."""

    pixels: int
    channels: int


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of `x` [B, C, H, W] lie beside each other; else it is read with its pixels so."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def pixel_tile(channels: int) -> PixelTile:
    """The tile that is read either way and written with the channels last: 64 of each, fewer where there are fewer."""
    width = 16
    while width < min(channels, 64):
        width *= 2
    return PixelTile(4096 // width, width)
