"""Two signed 4-bit integers in one byte."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_int4(codes: Tensor) -> Tensor:
    """Pack int8 codes [N, K] in -8..7 into uint8 [N, ceil(K / 2)], the even column in the low half; odd K is padded with 0.

    Raises ValueError where a code does not fit four bits.
    """
    if codes.numel() and (codes.min() < -8 or codes.max() > 7):
        raise ValueError(f"4-bit codes must lie in -8..7, got {int(codes.min())}..{int(codes.max())}")
    if codes.shape[1] % 2:
        codes = torch.cat([codes, codes.new_zeros(len(codes), 1)], dim=1)
    halves = codes.view(torch.uint8) & 0xF
    return halves[:, 0::2] | (halves[:, 1::2] << 4)


def unpack_int4(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_int4`: uint8 [N, ceil(columns / 2)] to int8 [N, columns]."""
    # Shifting a signed byte right repeats its sign bit.
    pairs = packed.view(torch.int8)
    return torch.stack([(pairs << 4) >> 4, pairs >> 4], dim=2).flatten(1)[:, :columns]
