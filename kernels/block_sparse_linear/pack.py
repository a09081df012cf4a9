"""From a weight and a mask of its blocks to the blocks that are kept, row by row, and back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack_blocks(weight: Tensor, mask: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of `weight` [N, K] the blocks where bool `mask` [ceil(N / block), ceil(K / block)] is true, zeros beyond its edges.

    Gives values [blocks, block, block], the column of each int32 [blocks], and where the blocks of every row of blocks begin
    int32 [ceil(N / block) + 1]. Raises ValueError where the mask does not fit.
    """
    rows, columns = (-(-size // block) for size in weight.shape)
    if mask.dtype != torch.bool or list(mask.shape) != [rows, columns]:
        raise ValueError(f"mask must be torch.bool [{rows}, {columns}], got {mask.dtype} {list(mask.shape)}")
    padded = pad(weight, (0, columns * block - weight.shape[1], 0, rows * block - weight.shape[0]))
    tiles = padded.unflatten(1, (columns, block)).unflatten(0, (rows, block)).transpose(1, 2)
    starts = pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return tiles[mask].contiguous(), mask.nonzero()[:, 1].to(torch.int32), starts


def unpack_blocks(values: Tensor, column_index: Tensor, row_pointer: Tensor, outputs: int, depth: int) -> Tensor:
    """The weight [outputs, depth], with zeros where no block is kept."""
    block, rows = values.shape[1], len(row_pointer) - 1
    row_index = torch.repeat_interleave(torch.arange(rows, device=values.device), row_pointer.diff())
    tiles = values.new_zeros(rows, -(-depth // block), block, block)
    tiles[row_index, column_index.long()] = values
    return tiles.transpose(1, 2).flatten(2).flatten(0, 1)[:outputs, :depth]
