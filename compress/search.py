"""Rounding to nearest, scales and zero points searched on what was recorded: where every method starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffpress.calibration.observe import (
    LayerInput,
    RangeCandidates,
    channel_weights,
    layer_matrix,
    range_errors,
    rounding_errors,
)
from diffpress.calibration.trajectory import Progress, Trajectories
from diffpress.kernels import FP8_MAX, quantize, to_fp8

from .options import Rounding
from .quantized_layer import Format, QuantizedLayer, broadcast_scale
from .rounding import to_half
from .scales import choose_steps, range_candidates, search_group_scales, search_smoothing, search_weight_scale

Way = tuple[str, Format]
"""A layer, by its name, in a format."""


class _Input(NamedTuple):
    """How the input of one layer is going to be rounded."""

    smoothing: Tensor
    """[C]"""
    grid: RangeCandidates
    """Candidates, symmetric or not; only the first counts where steps get no scales of their own."""


def search(
    denoiser: nn.Module,
    ways: Sequence[Way],
    layer_inputs: Mapping[str, LayerInput],
    trajectories: Trajectories,
    options: Rounding,
    seed: int,
    progress: Progress | None = None,
) -> dict[Way, QuantizedLayer]:
    """Integers (or float8 numbers) and scales of layers in formats, one layer in several where asked.

    `denoiser` itself stays as it is.
    """
    steps = len(trajectories.timesteps)
    layers = {way: denoiser.get_submodule(way[0]) for way in ways}
    inputs = {
        (name, format): _search_input(layers[name, format], layer_inputs[name], format, options)
        for name, format in ways
        if format.activation_bits is not None
    }
    scales = _single_scales(inputs, steps)
    if inputs and options.per_step and options.format == "integer":
        scales |= _step_scales(denoiser, layers, inputs, trajectories, seed, progress)
    found = {}
    for way, layer in layers.items():
        name, format = way
        smoothing = inputs[way].smoothing if way in inputs else torch.ones(1)
        smoothing = smoothing.to(layer_matrix(layer).device)
        importance = layer_inputs[name].second_moment.to(smoothing.device) * smoothing.square()
        codes, weight_scale = round_weight(layer, format, importance, smoothing)
        activation_scale, zero_point = scales.get(way, (None, None))
        changed = None if bool((smoothing == 1).all()) else smoothing
        found[way] = QuantizedLayer(format, codes, weight_scale, activation_scale, zero_point, changed)
    return found


def _search_input(layer: nn.Module, layer_input: LayerInput, format: Format, options: Rounding) -> _Input:
    """Smoothing, then symmetric or not: whatever loses least on the sample of rows that was kept."""
    assert format.activation_bits is not None
    ones = torch.ones_like(layer_input.largest)
    if format.float8:
        return _Input(ones, RangeCandidates(layer_input.largest.max().clamp(min=1e-8)[None] / FP8_MAX, None))
    weight = layer_matrix(layer).cpu()
    bits = (format.weight_bits, format.activation_bits)
    smoothing = search_smoothing(weight, layer_input, bits, options.asymmetric) if options.smoothing else ones
    weights, rows = channel_weights(layer, smoothing).cpu(), layer_input.rows * smoothing
    families = range_candidates(layer_input, smoothing, bits[1], options.asymmetric)
    errors = [range_errors(rows, weights, family, bits[1]) for family in families]
    best = min(range(len(families)), key=lambda index: float(errors[index].min()))
    order = errors[best].argsort()
    family = families[best]
    return _Input(
        smoothing, RangeCandidates(family.scale[order], None if family.zero_point is None else family.zero_point[order])
    )


def _single_scales(inputs: Mapping[Way, _Input], steps: int) -> dict[Way, tuple[Tensor, Tensor | None]]:
    """The best candidate of each layer for all steps [S]."""
    return {way: _taken(own.grid, torch.zeros(steps, dtype=torch.long)) for way, own in inputs.items()}


def _step_scales(
    denoiser: nn.Module,
    layers: Mapping[Way, nn.Module],
    inputs: Mapping[Way, _Input],
    trajectories: Trajectories,
    seed: int,
    progress: Progress | None,
) -> dict[Way, tuple[Tensor, Tensor | None]]:
    """A candidate for each step [S], for layers where that holds on recorded runs it was not chosen on."""
    grids = {way: own.grid for way, own in inputs.items()}
    smoothings = {way: own.smoothing for way, own in inputs.items()}
    bits = {way: way[1].activation_bits or 0 for way in inputs}
    errors = rounding_errors(denoiser, layers, trajectories, grids, smoothings, bits, seed, progress)
    return {way: _taken(grids[way], choose_steps(errors[way])[0]) for way in inputs}


def _taken(grid: RangeCandidates, chosen: Tensor) -> tuple[Tensor, Tensor | None]:
    return grid.scale[chosen], None if grid.zero_point is None else grid.zero_point[chosen]


def round_weight(layer: nn.Module, format: Format, importance: Tensor, smoothing: Tensor) -> tuple[Tensor, Tensor]:
    """Codes in the shape of the weight and their scales, [O] or [O, G], that lose least.

    `importance` [C] is the mean square of each (smoothed) input channel; the weights are divided by `smoothing` [C].
    """
    weight = layer_matrix(layer) / smoothing[None, :, None]
    shape: torch.Size = layer.weight.shape  # type: ignore[assignment, union-attr]
    if format.float8:
        largest = weight.abs().amax((1, 2))
        scale = to_half(largest.where(largest > 0, 1) / FP8_MAX)
        return to_fp8(weight, scale[:, None, None]).view(shape), scale
    if format.group_size is None:
        scale = search_weight_scale(weight, importance, format.weight_bits)
    else:
        scale = search_group_scales(weight, importance, format.weight_bits, format.group_size)
    # Before codes are chosen: what is measured is what is stored.
    scale = to_half(scale)
    return quantize(weight.view(shape), broadcast_scale(scale, shape, format.group_size), format.weight_bits), scale
