"""How a kernel's output is cut into tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

SHALLOWEST = 16
"""Smallest depth of a tile that tensor cores take."""


class Tile(NamedTuple):
    """Sizes of what one program works on, and how it is compiled."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def pick(tiles: Sequence[Tile], rows: int, columns: int) -> Tile:
    """The first of `tiles`, largest first, that an output of `rows` by `columns` fills; else the one wasting least."""
    fitting = [tile for tile in tiles if tile.rows <= rows and tile.columns <= columns]
    return fitting[0] if fitting else min(tiles, key=lambda tile: tile.rows * tile.columns)


def tile_depth(tile: Tile, group_size: int) -> int:
    """How deep a tile of a weight can be so that it lies within one group of `group_size` columns; 0: there are none.

    A group that is no multiple of 16 has no such depth: 0.
    """
    depth = tile.depth
    while group_size % depth:
        depth //= 2
    return depth if depth >= SHALLOWEST else 0
