"""Post-training quantization: searched scales, weights that make up for each other, no training. Other methods start here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from diffpress.calibration.observe import SHARDS, layer_matrix, observe_inputs
from diffpress.calibration.sampling import denoiser_of
from diffpress.calibration.trajectory import Progress, Trajectories
from diffpress.export.errors import UnsupportedModelError
from diffpress.export.source import Form

from .attention import choose_attention
from .changes import Changes
from .gptq import gptq_layers
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
from .search import measure_sensitivity, round_weight, search
from .stage import Cost, Report, Running, Subject
from .stage_folder import StageFolder

ASK_FOR_A_DTYPE = ".wo"
"""Transformers' T5 casts what it feeds to `wo` to the dtype of that weight, unless it is int8."""


REPLAYS = 4
"""Passes over what was recorded that rounding takes, the search counted for its extra work."""


def check(subject: Subject, options: Rounding) -> None:
    """Raises RecipeError where a pattern of `keep` fits no layer, and UnsupportedModelError where no layer remains."""
    find_layers(subject.model, options)


def estimate(subject: Subject, options: Rounding, running: Running) -> Cost:
    """Replaying recorded calls is what takes time; nothing but the changes is written."""
    # The changes are at most as large as what is changed.
    disk_bytes = sum(form.size_bytes for form in subject.forms.values())
    if subject.model is not denoiser_of(subject.pipeline):
        return Cost({}, disk_bytes)
    seconds = REPLAYS * min(SHARDS, running.recorded_batches) * running.steps * running.step_seconds
    return Cost({"quantize": seconds}, disk_bytes)


def run(subject: Subject, options: Rounding, folder: StageFolder, report: Report) -> Changes:
    """The method `ptq`. Raises RecipeError where a pattern fits no layer, UnsupportedModelError where none gets smaller."""
    return changes_of(quantize(subject, options, report), subject.forms)


def quantize(subject: Subject, options: Rounding, report: Report) -> QuantizationResult:
    """A denoiser by its recorded inputs, another component by its weights alone."""
    if subject.model is not denoiser_of(subject.pipeline):
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
    seen = observe_inputs(denoiser, layers, trajectories, seed, progress) if layers else {}
    found.reasons |= {name: "never called while recording" for name in layers if name not in seen}
    layers = {name: layer for name, layer in layers.items() if name in seen}
    formats, why = choose_formats(layers, seen, options)
    found.reasons |= why

    def rounded(formats: Mapping[str, Format]) -> dict[str, QuantizedLayer]:
        chosen = {name: layers[name] for name in formats}
        quantized = search(denoiser, chosen, seen, formats, trajectories, options, seed, progress)
        return gptq_layers(denoiser, quantized, trajectories, seed, progress) if options.gptq else quantized

    found.layers = rounded(formats)
    found.sensitivity = measure_sensitivity(denoiser, found.layers, trajectories)
    if options.effective_bits is not None:
        _allocate_bits_(found, denoiser, trajectories, options.effective_bits, rounded)
    if options.float_activations:
        macs = {name: entry.macs for name, entry in seen.items()}
        _keep_activations_in_float_(found, denoiser, trajectories, macs, options.float_activations, rounded)
    found.layers |= _without_inputs(
        {name: candidates[name] for name in candidates if name not in layers}, options, found
    )
    drop_what_does_not_shrink_(found, forms)
    found.attention = choose_attention(denoiser, trajectories, options, found.sensitivity)
    if not found.layers:
        raise UnsupportedModelError(f"{type(denoiser).__name__} has no layer that would be smaller than it is now.")
    return found


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
    found: QuantizationResult,
    denoiser: nn.Module,
    trajectories: Trajectories,
    effective_bits: float,
    rounded: Callable[[Mapping[str, Format]], dict[str, QuantizedLayer]],
) -> None:
    """Give the layers that gain most for a bit the safe number of bits, until the average is `effective_bits`."""
    low = {name: layer for name, layer in found.layers.items() if layer.format.weight_bits < HIGH_BITS}
    safer = rounded({name: high_format(layer.format) for name, layer in low.items()})
    errors = measure_sensitivity(denoiser, safer, trajectories)
    gains = {name: found.sensitivity[name] - errors[name] for name in low}
    for name in select_high_precision(gains, low, effective_bits):
        found.layers[name], found.sensitivity[name] = safer[name], errors[name]
        found.reasons[name] = f"sensitive, {HIGH_BITS} bits"


def _keep_activations_in_float_(
    found: QuantizationResult,
    denoiser: nn.Module,
    trajectories: Trajectories,
    macs: Mapping[str, int],
    share: float,
    rounded: Callable[[Mapping[str, Format]], dict[str, QuantizedLayer]],
) -> None:
    """Leave the inputs of the layers in float that err most for what they multiply, up to that share of all `macs`."""
    integers = {name: own.format for name, own in found.layers.items() if own.format.activation_bits is not None}
    chosen = select_float_activations(
        {name: found.sensitivity[name] for name in integers}, macs, share * sum(macs.values())
    )
    spared = rounded({name: weights_only(denoiser.get_submodule(name), integers[name].weight_bits) for name in chosen})
    errors = measure_sensitivity(denoiser, spared, trajectories)
    for name in chosen:
        if errors[name] < found.sensitivity[name]:
            found.layers[name], found.sensitivity[name] = spared[name], errors[name]
            found.reasons[name] = f"{found.reasons.get(name, 'sensitive')}, inputs in float"
