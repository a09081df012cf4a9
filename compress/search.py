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
from diffpress.calibration.sampling import Call, replay
from diffpress.calibration.trajectory import Progress, Trajectories
from diffpress.export.runtime import StepClock
from diffpress.kernels import FP8_MAX, quantize, to_fp8

from .options import Rounding
from .quantized_layer import Format, QuantizedLayer, broadcast_scale, fake_quantized
from .scales import choose_steps, range_candidates, search_group_scales, search_smoothing, search_weight_scale


class _Input(NamedTuple):
    """How the input of one layer is going to be rounded."""

    smoothing: Tensor
    """[C]"""
    grid: RangeCandidates
    """Candidates, symmetric or not; only the first counts where steps get no scales of their own."""


def search(
    denoiser: nn.Module,
    layers: Mapping[str, nn.Module],
    seen: Mapping[str, LayerInput],
    formats: Mapping[str, Format],
    trajectories: Trajectories,
    options: Rounding,
    seed: int,
    progress: Progress | None = None,
) -> dict[str, QuantizedLayer]:
    """Integers (or float8 numbers) and scales of every layer in its format; `denoiser` itself stays as it is."""
    steps = len(trajectories.timesteps)
    inputs = {
        name: _search_input(layer, seen[name], formats[name], options)
        for name, layer in layers.items()
        if formats[name].activation_bits is not None
    }
    scales = _single_scales(inputs, steps)
    if inputs and options.per_step and options.format == "integer":
        scales |= _step_scales(denoiser, layers, inputs, formats, trajectories, seed, progress)
    found = {}
    for name, layer in layers.items():
        smoothing = inputs[name].smoothing if name in inputs else torch.ones(1)
        smoothing = smoothing.to(layer_matrix(layer).device)
        importance = seen[name].second_moment.to(smoothing.device) * smoothing.square()
        codes, weight_scale = round_weight(layer, formats[name], importance, smoothing)
        activation_scale, zero_point = scales.get(name, (None, None))
        changed = None if bool((smoothing == 1).all()) else smoothing
        found[name] = QuantizedLayer(formats[name], codes, weight_scale, activation_scale, zero_point, changed)
    return found


def _search_input(layer: nn.Module, seen: LayerInput, format: Format, options: Rounding) -> _Input:
    """Smoothing, then symmetric or not: whatever loses least on the sample of rows that was kept."""
    assert format.activation_bits is not None
    ones = torch.ones_like(seen.largest)
    if format.float8:
        return _Input(ones, RangeCandidates(seen.largest.max().clamp(min=1e-8)[None] / FP8_MAX, None))
    weight = layer_matrix(layer).cpu()
    bits = (format.weight_bits, format.activation_bits)
    smoothing = search_smoothing(weight, seen, bits, options.asymmetric) if options.smoothing else ones
    weights, rows = channel_weights(layer, smoothing).cpu(), seen.rows * smoothing
    families = range_candidates(seen, smoothing, bits[1], options.asymmetric)
    errors = [range_errors(rows, weights, family, bits[1]) for family in families]
    best = min(range(len(families)), key=lambda index: float(errors[index].min()))
    order = errors[best].argsort()
    family = families[best]
    return _Input(
        smoothing, RangeCandidates(family.scale[order], None if family.zero_point is None else family.zero_point[order])
    )


def _single_scales(inputs: Mapping[str, _Input], steps: int) -> dict[str, tuple[Tensor, Tensor | None]]:
    """The best candidate of each layer for all steps [S]."""
    return {name: _taken(own.grid, torch.zeros(steps, dtype=torch.long)) for name, own in inputs.items()}


def _step_scales(
    denoiser: nn.Module,
    layers: Mapping[str, nn.Module],
    inputs: Mapping[str, _Input],
    formats: Mapping[str, Format],
    trajectories: Trajectories,
    seed: int,
    progress: Progress | None,
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """A candidate for each step [S], for layers where that holds on recorded runs it was not chosen on."""
    grids = {name: own.grid for name, own in inputs.items()}
    smoothings = {name: own.smoothing for name, own in inputs.items()}
    bits = {name: formats[name].activation_bits or 0 for name in inputs}
    errors = rounding_errors(denoiser, layers, trajectories, grids, smoothings, bits, seed, progress)
    return {name: _taken(grids[name], choose_steps(errors[name])[0]) for name in inputs}


def _taken(grid: RangeCandidates, chosen: Tensor) -> tuple[Tensor, Tensor | None]:
    return grid.scale[chosen], None if grid.zero_point is None else grid.zero_point[chosen]


def round_weight(layer: nn.Module, format: Format, importance: Tensor, smoothing: Tensor) -> tuple[Tensor, Tensor]:
    """Codes in the shape of the weight and their scales, [O] or [O, G], that lose least.

    `importance` [C] is the mean square of each (smoothed) input channel; the weights are divided by `smoothing` [C].
    """
    weight = layer_matrix(layer) / smoothing[None, :, None]
    shape: torch.Size = layer.weight.shape  # type: ignore[assignment, union-attr]
    if format.float8:
        scale = weight.abs().amax((1, 2)).clamp(min=1e-12) / FP8_MAX
        return to_fp8(weight, scale[:, None, None]).view(shape), scale
    if format.group_size is None:
        scale = search_weight_scale(weight, importance, format.weight_bits)
    else:
        scale = search_group_scales(weight, importance, format.weight_bits, format.group_size)
    return quantize(weight.view(shape), broadcast_scale(scale, shape, format.group_size), format.weight_bits), scale


@torch.no_grad()
def measure_sensitivity(
    denoiser: nn.Module, layers: Mapping[str, QuantizedLayer], trajectories: Trajectories
) -> dict[str, float]:
    """Relative squared error of the denoiser's output with one layer rounded at a time, over `evaluation_calls`."""
    calls = evaluation_calls(trajectories)
    clock = StepClock(trajectories.timesteps)
    errors = {}
    for name, quantization in layers.items():
        with fake_quantized(denoiser, {name: quantization}, clock):
            errors[name] = output_error(denoiser, calls)
    return errors


def evaluation_calls(trajectories: Trajectories) -> list[Call]:
    """Three steps of one shard: the first, the one in the middle and the last."""
    calls = list(trajectories.calls(trajectories.shards[:1]))
    return [calls[0], calls[len(calls) // 2], calls[-1]]


def output_error(denoiser: nn.Module, calls: Sequence[Call]) -> float:
    """Relative squared error of what `denoiser` answers to recorded calls, a mean over them."""
    return sum(_relative_error(denoiser, call) for call in calls) / len(calls)


def _relative_error(denoiser: nn.Module, call: Call) -> float:
    truth = call.output.float()
    return float((replay(denoiser, call).float().cpu() - truth).square().mean() / truth.square().mean())
