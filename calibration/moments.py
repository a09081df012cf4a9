"""Second moments of what the columns of layers' weights are multiplied with, collected while recorded calls are replayed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .observe import input_rows
from .parts import in_parts
from .replaying import OncePerInput, replay_with
from .trajectory import Progress, Trajectories

BLOCK = 512
"""Columns that are looked at together; wider blocks gain GPTQ nothing, and moments grow with the square."""
ROWS = 64
"""Rows of a layer's input that are looked at per call; over 200 calls that is 25 for each column of a block."""
SMALLEST_BUDGET = 2**29
"""Bytes that moments may take at a time beside however small a model; a larger one gives them as much as half of itself, so
that the number of replays does not grow with it."""


class SecondMoments:
    """H = E[x x^T] of each layer's input x [K], block by block of its columns: [blocks, width, width].

    They are kept where those of all layers fit into memory; otherwise they are collected in one replay for each part.
    """

    def __init__(
        self, denoiser: nn.Module, layers: Mapping[str, nn.Module], trajectories: Trajectories, seed: int
    ) -> None:
        self.denoiser, self.layers, self.trajectories = denoiser, layers, trajectories
        self.generator = torch.Generator().manual_seed(seed)
        own = sum(parameter.nbytes for parameter in denoiser.parameters())
        self.parts = list(in_parts(layers, lambda name: _moment_bytes(layers[name]), max(SMALLEST_BUDGET, own // 2)))
        self.sums: dict[str, Tensor] = {name: torch.empty(0) for name in self.parts[0]}
        self.rows: dict[str, int] = {}
        self.product = OncePerInput(self._product)

    def look(self, name: str, x: Tensor, step: int) -> None:
        """Take in what the layer `name` is fed; the first part is collected by handing this to a replay."""
        if name not in self.sums:
            return
        product, rows = self.product(self.layers[name], x)
        self.sums[name] = self.sums[name].add_(product) if name in self.rows else product.clone()
        self.rows[name] = self.rows.get(name, 0) + rows

    def _product(self, layer: nn.Module, x: Tensor) -> tuple[Tensor, int]:
        """X^T X of a sample of rows X [N, K], block by block, and N."""
        rows = in_blocks(input_rows(layer, x, ROWS, self.generator))
        return rows.transpose(1, 2) @ rows, rows.shape[1]

    def of(self, names: Collection[str], progress: Progress | None = None) -> Iterator[tuple[str, Tensor]]:
        """The moments of the layers `names`, one after the other."""
        for part in self.parts:
            wanted = [name for name in part if name in names]
            if wanted and not self.rows.keys() >= set(wanted):
                self._collect(part, progress)
            for name in wanted:
                yield name, self.sums[name] / self.rows[name]

    def _collect(self, part: list[str], progress: Progress | None) -> None:
        self.sums, self.rows = {name: torch.empty(0) for name in part}, {}
        chosen = {name: self.layers[name] for name in part}
        replay_with(self.denoiser, chosen, self.trajectories, self.look, progress)


def _moment_bytes(layer: nn.Module) -> int:
    blocks, width = block_sizes(layer.weight[0].numel())  # type: ignore[union-attr, operator, index]
    return blocks * width**2 * 4


def block_sizes(columns: int) -> tuple[int, int]:
    """How many blocks the columns are cut into, and how wide they are; the last may be short."""
    count = ceil(columns / BLOCK)
    return count, ceil(columns / count)


def in_blocks(rows: Tensor, filling: float = 0.0) -> Tensor:
    """[N, K] as [blocks, N, width]; what a short last block lacks is `filling`."""
    count, width = block_sizes(rows.shape[1])
    return F.pad(rows, (0, count * width - rows.shape[1]), value=filling).unflatten(1, (count, width)).transpose(0, 1)
