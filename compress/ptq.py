"""Post-training quantization: searched scales, weights that make up for each other, no training. Other methods start here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import NamedTuple

import torch
from torch import nn

from diffpress.calibration.moments import SecondMoments
from diffpress.calibration.observe import STEP_SHARDS, LayerInput, layer_matrix, observe_inputs
from diffpress.calibration.replaying import SHARDS, replayed_steps
from diffpress.calibration.trajectory import Progress, Trajectories
from diffpress.export.errors import UnsupportedModelError
from diffpress.export.source import Form

from .attention import choose_attention
from .changes import Changes
from .data_flow import edge_layers
from .gptq import gptq
from .layers import (
    HIGH_BITS,
    choose_formats,
    find_layers,
    high_format,
    select_float_activations,
    select_high_precision,
    weights_only,
)
from .options import Rounding
from .quantized_layer import Format, QuantizedLayer
from .result import QuantizationResult, changes_of, drop_what_does_not_shrink_
from .search import Way, round_weight, search
from .sensitivity import measure_layers
from .stage import Cost, Report, Running, Subject
from .stage_folder import StageFolder

ASK_FOR_A_DTYPE = ".wo"
"""Transformers' T5 casts what it feeds to `wo` to the dtype of that weight, unless it is int8."""


WATCHING = 2
"""What a replayed call takes, over what the call itself takes, while all inputs of layers are looked at and searched for."""
MEASURING = 64
"""Calls that it takes to measure: in each of three, forwards and backwards, and the rounding in both."""


def check(subject: Subject, options: Rounding) -> None:
    """Raises RecipeError where a pattern of `keep` fits no layer, and UnsupportedModelError where no layer remains."""
    find_layers(subject.model, options)


def estimate(subject: Subject, options: Rounding, running: Running) -> Cost:
    """Calls of the denoiser are what takes time, whatever its size; nothing but the changes is written."""
    # The changes are at most as large as what is changed.
    disk_bytes = sum(form.size_bytes for form in subject.forms.values())
    if not subject.denoises:
        return Cost({}, disk_bytes)
    batches = running.recorded_batches
    # Inputs are looked at once, and their ranges in two halves.
    looked_at = (min(SHARDS, batches), *[ceil(min(STEP_SHARDS, batches) / 2)] * 2)
    calls = WATCHING * sum(replayed_steps(shards, running.steps) for shards in looked_at) + MEASURING
    seconds = calls * running.step_seconds
    return Cost({"quantize": seconds}, disk_bytes)


def run(subject: Subject, options: Rounding, folder: StageFolder, report: Report) -> Changes:
    """The method `ptq`. Raises RecipeError where a pattern fits no layer, UnsupportedModelError where none gets smaller."""
    return changes_of(quantize(subject, options, report), subject.forms)


def quantize(subject: Subject, options: Rounding, report: Report) -> QuantizationResult:
    """A denoiser by its recorded inputs, another component by its weights alone."""
    if not subject.denoises:
        return quantize_weights(subject.component, subject.model, subject.forms, options)
    return quantize_denoiser(
        subject.component,
        subject.model,
        subject.forms,
        subject.trajectories,
        options,
        subject.seed,
        partial(report, "quantize"),
    )


def quantize_denoiser(
    component: str,
    denoiser: nn.Module,
    forms: Mapping[str, Form],
    trajectories: Trajectories,
    options: Rounding,
    seed: int,
    progress: Progress | None = None,
) -> QuantizationResult:
    """Find integers for every Linear, Conv2d and Embedding of `denoiser`, which itself stays as it is.

    `forms` are those in which the source stores its tensors. Raises RecipeError where a pattern fits no layer, and
    UnsupportedModelError where no layer can be quantized.
    """
    found = QuantizationResult(component)
    candidates, found.reasons = find_layers(denoiser, options)
    layers = {name: layer for name, layer in candidates.items() if not isinstance(layer, nn.Embedding)}
    if layers:
        _quantize_layers_(found, denoiser, layers, trajectories, options, seed, progress)
    others = {name: layer for name, layer in candidates.items() if name not in found.layers}
    found.layers |= _without_inputs(others, options, found)
    drop_what_does_not_shrink_(found, forms)
    found.attention = choose_attention(denoiser, trajectories, options, found.sensitivity, seed)
    if progress is not None:
        progress(1, 1)
    if not found.layers:
        raise UnsupportedModelError(f"{type(denoiser).__name__} has no layer that would be smaller than it is now.")
    return found


def _quantize_layers_(
    found: QuantizationResult,
    denoiser: nn.Module,
    layers: Mapping[str, nn.Module],
    trajectories: Trajectories,
    options: Rounding,
    seed: int,
    progress: Progress | None,
) -> None:
    """Round every Linear and Conv2d that was called, in the format that suits it."""
    moments = SecondMoments(denoiser, layers, trajectories, seed) if options.gptq else None
    others = () if moments is None else (moments.look,)
    seen = observe_inputs(denoiser, layers, trajectories, seed, progress, others)
    found.reasons |= {name: "never called while recording" for name in layers if name not in seen}
    layers = {name: layer for name, layer in layers.items() if name in seen}
    edges = edge_layers(denoiser, next(trajectories.calls()))
    formats, why = choose_formats(layers, seen, edges, options)
    found.reasons |= why
    rounded = _Rounder(denoiser, seen, moments, trajectories, options, seed, progress)
    low = {} if options.effective_bits is None else {n: f for n, f in formats.items() if f.weight_bits < HIGH_BITS}
    results = rounded([*formats.items(), *((name, high_format(format)) for name, format in low.items())])
    for way in formats.items():
        _take_(found, way, results)
    if options.effective_bits is not None:
        _allocate_bits_(found, low, results, options.effective_bits)
    if options.float_activations:
        macs = {name: entry.macs for name, entry in seen.items()}
        _keep_activations_in_float_(found, layers, macs, options.float_activations, rounded)


class _Rounded(NamedTuple):
    """A layer in a format."""

    layer: QuantizedLayer
    error: float
    """Of the denoiser's output when only this layer is rounded."""


@dataclass(frozen=True)
class _Rounder:
    """Rounds layers of a denoiser, and measures what that loses."""

    denoiser: nn.Module
    seen: Mapping[str, LayerInput]
    moments: SecondMoments | None
    """None where weights need not make up for each other."""
    trajectories: Trajectories
    options: Rounding
    seed: int
    progress: Progress | None

    def __call__(self, ways: Sequence[Way]) -> dict[Way, _Rounded]:
        layers = search(self.denoiser, ways, self.seen, self.trajectories, self.options, self.seed, self.progress)
        by_name: dict[str, list[Way]] = {}
        for way in ways:
            by_name.setdefault(way[0], []).append(way)
        for name, h in self.moments.of(by_name, self.progress) if self.moments is not None else ():
            layers |= {way: gptq(self.denoiser.get_submodule(name), layers[way], h) for way in by_name[name]}
        chosen = {name: [layers[way] for way in own] for name, own in by_name.items()}
        errors = measure_layers(self.denoiser, chosen, self.trajectories, self.seed)
        return {
            way: _Rounded(layers[way], error)
            for name, own in by_name.items()
            for way, error in zip(own, errors[name], strict=True)
        }


def _take_(found: QuantizationResult, way: Way, results: Mapping[Way, _Rounded]) -> None:
    found.layers[way[0]], found.sensitivity[way[0]] = results[way]


def quantize_weights(
    component: str, model: nn.Module, forms: Mapping[str, Form], options: Rounding
) -> QuantizationResult:
    """Find integers for the weights of a model that nothing was observed of, such as a text encoder; inputs stay in float.

    Raises RecipeError where a pattern fits no layer, and UnsupportedModelError where there is no layer to quantize.
    """
    found = QuantizationResult(component)
    layers, found.reasons = find_layers(model, options)
    found.layers = _without_inputs(layers, options, found)
    drop_what_does_not_shrink_(found, forms)
    return found


def _without_inputs(
    layers: Mapping[str, nn.Module], options: Rounding, found: QuantizationResult
) -> dict[str, QuantizedLayer]:
    """Weights only, every input channel counting alike; layers with a reason already are left out."""
    quantized = {}
    for name, layer in layers.items():
        if name in found.reasons:
            continue
        if isinstance(layer, nn.Embedding) or name.endswith(ASK_FOR_A_DTYPE):
            format = weights_only(layer, HIGH_BITS)
            found.reasons[name] = (
                "embedding, 8 bits" if isinstance(layer, nn.Embedding) else "its model asks for 8 bits"
            )
        else:
            format = weights_only(layer, options.weights, options.group_size)
        weight = layer_matrix(layer)
        channels = torch.ones(weight.shape[1], device=weight.device)
        quantized[name] = QuantizedLayer(format, *round_weight(layer, format, channels, channels))
    return quantized


def _allocate_bits_(
    found: QuantizationResult, low: Mapping[str, Format], results: Mapping[Way, _Rounded], effective_bits: float
) -> None:
    """Give the layers that gain most for a bit HIGH_BITS instead of their `low` format, up to `effective_bits` on average."""
    high = {name: (name, high_format(format)) for name, format in low.items()}
    chosen = select_high_precision(
        {name: found.sensitivity[name] - results[way].error for name, way in high.items()},
        {name: found.layers[name] for name in low},
        {name: results[way].layer for name, way in high.items()},
        effective_bits,
    )
    for name in chosen:
        _take_(found, high[name], results)
        found.reasons[name] = f"sensitive, {HIGH_BITS} bits"


def _keep_activations_in_float_(
    found: QuantizationResult,
    layers: Mapping[str, nn.Module],
    macs: Mapping[str, int],
    share: float,
    rounded: Callable[[Sequence[Way]], dict[Way, _Rounded]],
) -> None:
    """Leave the inputs of the layers in float that err most for what they multiply, up to that share of all `macs`."""
    integers = {name: own.format for name, own in found.layers.items() if own.format.activation_bits is not None}
    chosen = select_float_activations(
        {name: found.sensitivity[name] for name in integers}, macs, share * sum(macs.values())
    )
    ways = [(name, weights_only(layers[name], integers[name].weight_bits)) for name in chosen]
    results = rounded(ways) if ways else {}
    for way in ways:
        name = way[0]
        if results[way].error < found.sensitivity[name]:
            _take_(found, way, results)
            found.reasons[name] = f"{found.reasons.get(name, 'sensitive')}, inputs in float"
