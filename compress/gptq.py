"""Weights rounded column after column, the columns to come making up for the errors of those before (GPTQ)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpress.calibration.observe import input_rows, layer_matrix, replay_with
from diffpress.calibration.trajectory import Progress, Trajectories
from diffpress.export.runtime import StepClock
from diffpress.kernels import code_range

from .quantized_layer import QuantizedLayer, broadcast_scale, smoothed

BLOCK = 512
"""Columns that make up for each other at most; more gain nothing, and their moments grow with the square."""
DAMPING = 0.3
"""Share of the mean second moment that is added to each: other images are correlated less than those that were recorded."""
ROWS = 128
"""Rows of a layer's input that are looked at per call."""
MOMENT_BYTES = 2**29
"""Second moments that are collected in one replay of the recorded calls."""


@torch.no_grad()
def gptq_layers(
    denoiser: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    trajectories: Trajectories,
    seed: int,
    progress: Progress | None = None,
) -> dict[str, QuantizedLayer]:
    """The same layers with other codes where weights are integers; scales stay.

    Frantar et al. 2022, arXiv 2210.17323, within blocks of columns and with strong damping. No code moves by more than one
    from the nearest, so that a weight stays what it was.
    """
    found = dict(layers)
    for part in _parts({name: own for name, own in layers.items() if not own.format.float8}):
        moments = _second_moments(denoiser, part, trajectories, seed, progress)
        for name, own in part.items():
            weight = layer_matrix(denoiser.get_submodule(name))
            if own.smoothing is not None:
                weight = weight / own.smoothing[None, :, None]
            scale = broadcast_scale(own.weight_scale, own.codes.shape, own.format.group_size).flatten(1)
            codes = round_columns(weight.flatten(1), scale, moments.pop(name), own.format.weight_bits)
            found[name] = replace(own, codes=codes.view(own.codes.shape))
    return found


def _parts(layers: Mapping[str, QuantizedLayer]) -> Iterator[dict[str, QuantizedLayer]]:
    """The layers in groups whose moments fit into MOMENT_BYTES, one at least."""
    part: dict[str, QuantizedLayer] = {}
    taken = 0
    for name, own in layers.items():
        blocks, width = _blocks(own.codes[0].numel())
        size = blocks * width**2 * 4
        if part and taken + size > MOMENT_BYTES:
            yield part
            part, taken = {}, 0
        part[name] = own
        taken += size
    if part:
        yield part


def _blocks(columns: int) -> tuple[int, int]:
    """How many blocks the columns are cut into, and how wide they are; the last may be short."""
    count = ceil(columns / BLOCK)
    return count, ceil(columns / count)


def _second_moments(
    denoiser: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    trajectories: Trajectories,
    seed: int,
    progress: Progress | None,
) -> dict[str, Tensor]:
    """Sums of x x^T over rows of each layer's smoothed and rounded input, block by block: [blocks, width, width]."""
    modules = {name: denoiser.get_submodule(name) for name in layers}
    generator = torch.Generator().manual_seed(seed)
    timesteps = trajectories.timesteps
    clock = StepClock(timesteps)
    moments: dict[str, Tensor] = {}

    def look(name: str, x: Tensor, step: int) -> None:
        own, layer = layers[name], modules[name]
        clock.set(timesteps[step])
        rows = own.rounded(input_rows(layer, smoothed(layer, x, own.smoothing), ROWS, generator), clock)
        blocks = _in_blocks(rows)
        product = blocks.transpose(1, 2) @ blocks
        moments[name] = product if name not in moments else moments[name].add_(product)

    replay_with(denoiser, modules, trajectories, look, progress)
    return moments


def _in_blocks(rows: Tensor, filling: float = 0.0) -> Tensor:
    """[N, K] as [blocks, N, width]."""
    count, width = _blocks(rows.shape[1])
    return F.pad(rows, (0, count * width - rows.shape[1]), value=filling).unflatten(1, (count, width)).transpose(0, 1)


def round_columns(weight: Tensor, scale: Tensor, moments: Tensor, bits: int) -> Tensor:
    """int8 codes [O, K] of `weight` [O, K] in units of `scale` (which broadcasts against it), for inputs of those `moments`.

    `moments` [blocks, width, width] as of `_second_moments`. Columns with large inputs go first.
    """
    rest, units = _in_blocks(weight).clone(), _in_blocks(scale.expand_as(weight), 1.0)
    nearest = (rest / units).round_()
    first, last = code_range(bits)
    codes = torch.empty_like(rest)
    order = moments.diagonal(dim1=1, dim2=2).argsort(1, descending=True)
    factor = _inverse_factor(moments, order)
    rest, units, nearest = (value.take_along_dim(order[:, None], 2) for value in (rest, units, nearest))
    for place in range(rest.shape[2]):
        column, unit, near = rest[:, :, place], units[:, :, place], nearest[:, :, place]
        code = torch.minimum(torch.maximum((column / unit).round_(), near - 1), near + 1).clamp_(first, last)
        codes[:, :, place] = code
        error = (column - code * unit) / factor[:, place, place, None]
        rest[:, :, place:] -= error[:, :, None] * factor[:, None, place, place:]
    codes = codes.take_along_dim(order.argsort(1)[:, None], 2)
    return codes.transpose(0, 1).flatten(1)[:, : weight.shape[1]].to(torch.int8)


def _inverse_factor(moments: Tensor, order: Tensor) -> Tensor:
    """The upper triangle U with U^T U the inverse of the damped moments, their columns in that `order` [blocks, width]."""
    ordered = moments.take_along_dim(order[:, :, None], 1).take_along_dim(order[:, None, :], 2)
    diagonal = ordered.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    # What is always fed zeros has any inverse.
    diagonal += (DAMPING * mean).where(mean > 0, 1)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
    return torch.linalg.cholesky(inverse, upper=True)
