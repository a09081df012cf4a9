"""Signed integers of a few bits, one after the other in the bytes of a row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .quantization import code_range

WEIGHT_BITS = (2, 3, 4, 8)
"""Widths that weights are stored in."""


def packed_form(columns: int, bits: int) -> tuple[torch.dtype, int]:
    """How a row of `columns` codes is stored: its dtype and its length.

    Raises ValueError where nothing is stored in so many bits.
    """
    if bits not in WEIGHT_BITS:
        raise ValueError(f"weights are stored in 2, 3, 4 or 8 bits, not in {bits}")
    return torch.int8 if bits == 8 else torch.uint8, -(-columns * bits // 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack int8 codes [N, K] into uint8 [N, ceil(K * bits / 8)], the lowest bits first; at 8 bits they stay int8 [N, K].

    Code i of a row takes its bits [i * bits, (i + 1) * bits); the rest of the last byte is 0. Raises ValueError where a
    code does not fit.
    """
    _, length = packed_form(codes.shape[1], bits)
    if bits == 8:
        return codes
    low, high = code_range(bits)
    if codes.numel() and (codes.min() < low or codes.max() > high):
        raise ValueError(f"{bits}-bit codes must lie in {low}..{high}, got {int(codes.min())}..{int(codes.max())}")
    # Eight codes fill `bits` bytes, whatever their width.
    fields = pad(codes, (0, -codes.shape[1] % 8)).unflatten(1, (-1, 8)).long() & (2**bits - 1)
    words = (fields << bits * torch.arange(8, device=codes.device)).sum(2, keepdim=True)
    parts = (words >> 8 * torch.arange(bits, device=codes.device)) & 0xFF
    return parts.to(torch.uint8).flatten(1)[:, :length].contiguous()


def unpack_codes(packed: Tensor, columns: int, bits: int) -> Tensor:
    """The inverse of `pack_codes`: int8 [N, columns]."""
    if bits == 8:
        return packed
    raised = _raised_triples(packed) if bits == 3 else _raised(packed.view(torch.int8), bits)
    codes = torch.stack(raised, dim=2)
    # Shifting a signed number right repeats its sign bit.
    codes >>= 8 - bits
    return codes.flatten(1)[:, :columns]


def _raised(packed: Tensor, bits: int) -> list[Tensor]:
    """The codes of every byte, each moved to the top of one of its own."""
    return [packed << (8 - bits - start) for start in range(0, 8, bits)]


def _raised_triples(packed: Tensor) -> list[Tensor]:
    """The same for the eight 3-bit codes of every three bytes."""
    first, second, third = pad(packed, (0, -packed.shape[1] % 3)).unflatten(1, (-1, 3)).int().unbind(2)
    word = first | second << 8 | third << 16
    return [((word << 5) >> start).to(torch.int8) for start in range(0, 24, 3)]
