"""How a kernel's output is cut into tiles."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import torch

SHALLOWEST = 16
"""Smallest depth of a tile that tensor cores take."""
AT_ONCE = 264
"""Programs that run at the same time: two on each multiprocessor of an H100. Taken for every GPU, so that it has no part in how
sums are cut."""
LOADING = 32
"""How many products of a tile take as long as it takes to load one number of x or of the weight."""


class Tile(NamedTuple):
    """Sizes of what one program works on, and how it is compiled."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def programs(self, rows: int, columns: int) -> int:
        """How many tiles an output is cut into."""
        return ceil_div(rows, self.rows) * ceil_div(columns, self.columns)

    def cost(self) -> int:
        """What a tile takes for every column of the weight: its products, and loading what they multiply."""
        return self.rows * self.columns + LOADING * (self.rows + self.columns)


@lru_cache(maxsize=4096)
def pick(tiles: tuple[Tile, ...], rows: int, columns: int) -> Tile:
    """Of `tiles`, largest first, that in which an output of `rows` by `columns` is done soonest.

    The last programs leave most of a GPU idle where they are few: large tiles multiply more for what they load, small ones
    share the work more evenly.
    """
    return min(tiles, key=lambda tile: ceil_div(tile.programs(rows, columns), AT_ONCE) * tile.cost())


def ceil_div(number: int, by: int) -> int:
    """Rounded up. Triton's own, made for kernels too, takes a processor twenty times as long."""
    return -(-number // by)


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether tensor cores read their operands from shared memory, as H100's and H200's do, so that larger tiles fit."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def tile_depth(tile: Tile, group_size: int) -> int:
    """How deep a tile of a weight can be so that it lies within one group of `group_size` columns; 0: there are none.

    A group that is no multiple of 16 has no such depth: 0.
    """
    depth = tile.depth
    while group_size % depth:
        depth //= 2
    return depth if depth >= SHALLOWEST else 0
