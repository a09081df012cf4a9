"""Second moments of what layers are fed, all columns of a layer together, and of that with what they are to answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpress.calibration.observe import input_rows_at, output_places, rows_at
from diffpress.calibration.parts import in_parts
from diffpress.calibration.replaying import looked_at
from diffpress.calibration.sampling import replay
from diffpress.calibration.trajectory import Progress, Trajectories

ROWS_A_COLUMN = 16
"""Rows of a layer's input that are looked at in all, for each of its columns."""
FEWEST_ROWS = 64
"""Of a call, however few columns a layer has."""
CALLS = 128
"""Recorded calls that are looked at, spread over all images and all steps: what is fitted to few prompts suits no others."""
BUDGET = 2**29
"""Bytes that moments may take at a time; those of more layers are collected in several replays."""

Wearing = Callable[[], AbstractContextManager[None]]
"""What is worn while a layer's inputs are looked at."""


@dataclass
class Moments:
    """Means over rows x [K] of a layer's input, a 1 behind it where the layer has a bias, and what it is to answer, y [out]."""

    xx: Tensor
    """[K, K] of x x^T, float64."""
    yx: Tensor
    """[out, K] of y x^T."""


@torch.no_grad()
def moments_of(
    model: nn.Module,
    names: Sequence[str],
    trajectories: Trajectories,
    shards: Sequence[Path],
    seed: int,
    wearing: Wearing | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[str, Moments]]:
    """Layer by layer, over recorded calls of the `shards`; y is what the layers of `model` answer as they are now.

    Where `wearing` is given, x is what they are fed while that is worn.
    """
    calls = spread_calls(trajectories, shards, CALLS)
    for part in in_parts(names, lambda name: _moment_bytes(model.get_submodule(name)), BUDGET):
        collected = _Collected(model, part, seed)
        for index, (shard, place) in enumerate(calls):
            call = trajectories.call(shard, place)
            collected.begin(index, len(calls))
            with collected.looking(answers=True, inputs=wearing is None):
                replay(model, call)
            if wearing is not None:
                with wearing(), collected.looking(answers=False, inputs=True):
                    replay(model, call)
            collected.take()
            if progress is not None:
                progress(index + 1, len(calls))
        yield from collected.means()


def spread_calls(trajectories: Trajectories, shards: Sequence[Path], count: int) -> list[tuple[Path, int]]:
    """About `count` recorded calls: some steps of every shard, others of the next."""
    turns = max(1, sum(len(trajectories.steps(shard)) for shard in shards) // count)
    return [(shard, place) for shard, own in looked_at(trajectories, shards, turns).items() for place in own]


def _moment_bytes(layer: nn.Module) -> int:
    out, width = matrix_shape(layer)
    return 8 * width * (width + out)


def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """Of what `affine` gives."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return len(weight), weight[0].numel() + (layer.bias is not None)


class _Collected:
    """Sums over calls of the moments of some layers."""

    def __init__(self, model: nn.Module, names: Sequence[str], seed: int) -> None:
        self.model, self.names, self.seed = model, names, seed
        self.sums: dict[str, Moments] = {}
        self.rows = dict.fromkeys(names, 0)
        self.places: dict[str, Tensor] = {}
        self.x: dict[str, Tensor] = {}
        self.y: dict[str, Tensor] = {}

    def begin(self, call: int, calls: int) -> None:
        """Each call's positions are drawn anew, and are the same however often it is made, and by whom."""
        self.call, self.calls = call, calls
        self.places, self.x, self.y = {}, {}, {}

    @contextmanager
    def looking(self, *, answers: bool, inputs: bool) -> Iterator[None]:
        """Keep rows of what the layers answer, or of what they are fed, while the model is called."""

        def look(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
                if name not in self.places:
                    self.places[name] = self._draw(layer, arguments[0])
                places = self.places[name]
                if answers:
                    self.y[name] = rows_at(layer, output, places).double()
                if inputs:
                    x = input_rows_at(layer, arguments[0], places).double()
                    self.x[name] = x if layer.bias is None else F.pad(x, (0, 1), value=1.0)

            return hook

        handles = [self.model.get_submodule(name).register_forward_hook(look(name)) for name in self.names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _draw(self, layer: nn.Module, x: Tensor) -> Tensor:
        columns = layer.weight[0].numel()  # type: ignore[union-attr, operator, index]
        count = max(FEWEST_ROWS, ceil(ROWS_A_COLUMN * columns / self.calls))
        return output_places(layer, x, count, torch.Generator().manual_seed(self.seed + self.call))

    def take(self) -> None:
        """Add what was kept of this call to the sums."""
        for name, x in self.x.items():
            own = Moments(x.t() @ x, self.y[name].t() @ x)
            if name in self.sums:
                self.sums[name].xx += own.xx
                self.sums[name].yx += own.yx
            else:
                self.sums[name] = own
            self.rows[name] += len(x)

    def means(self) -> Iterator[tuple[str, Moments]]:
        """The moments of every layer that was called."""
        for name, own in self.sums.items():
            yield name, Moments(own.xx / self.rows[name], own.yx / self.rows[name])


def affine(layer: nn.Module) -> Tensor:
    """The weight of a Linear or Conv2d as [out, K], float64, its bias behind it where it has one."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    matrix = weight.detach().flatten(1).double()
    bias = layer.bias
    return matrix if bias is None else torch.cat([matrix, bias.detach().double()[:, None]], 1)  # type: ignore[union-attr, operator]
