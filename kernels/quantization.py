"""Symmetric integers: value = code * scale."""

from __future__ import annotations

import torch
from torch import Tensor


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest signed code of `bits` bits."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def quantize(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes int8 of float `values`, rounded half to even and clipped; `scale` (float32) broadcasts against them.

    The division is done in float32, so that every engine gets the same code from the same value.
    """
    low, high = code_range(bits)
    # A division gives a new tensor, so the rest may work in place.
    return torch.div(values.float(), scale).round_().clamp_(low, high).to(torch.int8)


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """Float32 values of integer codes; `scale` broadcasts against them."""
    return codes.float() * scale
