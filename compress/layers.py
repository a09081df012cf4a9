"""Which layers are quantized, and to which formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from diffpress.calibration.observe import LayerInput
from diffpress.export.errors import RecipeError, UnsupportedModelError
from diffpress.export.runtime import computes_attention, why_not_packable
from diffpress.export.ties import ties

from .options import Rounding
from .quantized_layer import Format, QuantizedLayer

KINDS = (nn.Linear, nn.Conv2d, nn.Embedding)
"""Modules whose weights can be stored in fewer bits."""
HIGH_BITS = 8
"""Bits of a weight whose error would reach everything."""
EDGE_GROUP = 32
"""Columns of the first and last layer that share a scale; the layers are small, and few scales would be what hurts most."""


def find_layers(model: nn.Module, options: Rounding) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers that can be quantized, and per other one the reason why it is left alone.

    Raises RecipeError where a pattern of `keep` fits no layer, and UnsupportedModelError where no layer remains.
    """
    candidates = {name: module for name, module in model.named_modules() if isinstance(module, KINDS)}
    names = [*candidates, *(attention_names(model) if options.attention != "none" else ())]
    kept = {name for pattern in options.keep for name in _matching(pattern, names)}
    tied = ties(model)
    layers: dict[str, nn.Module] = {}
    reasons: dict[str, str] = {}
    for name, module in candidates.items():
        reason = "kept by the recipe" if name in kept else why_not_packable(module) or _why_taken(module)
        if reason is None and f"{name}.weight" in tied:
            reason = f"its weight is that of {tied[f'{name}.weight']}"
        if reason is None:
            layers[name] = module
        else:
            reasons[name] = reason
    if not layers:
        raise UnsupportedModelError(_nothing_left(model, reasons))
    return layers, reasons


def _why_taken(layer: nn.Module) -> str | None:
    """The reason why a layer that an earlier stage has put another in the place of, which is worn, cannot be packed."""
    answering = getattr(layer.forward, "__self__", layer)
    return None if answering is layer else f"an earlier stage made a {type(answering).__name__} of it"


def attention_names(model: nn.Module) -> list[str]:
    """What patterns call the attentions of a model, as diffusers does: by their processors."""
    return [f"{name}.processor" for name, module in model.named_modules() if computes_attention(module)]


def _matching(pattern: str, candidates: Sequence[str]) -> list[str]:
    found = [name for name in candidates if fnmatchcase(name, pattern)]
    if not found and candidates:
        near = get_close_matches(pattern, candidates, 3, 0.3) or candidates[:3]
        raise RecipeError(f"quantize.keep: {pattern!r} fits no layer. Near it are {', '.join(near)}.")
    return found


def _nothing_left(model: nn.Module, reasons: Mapping[str, str]) -> str:
    words = " or ".join(kind.__name__ for kind in KINDS)
    why = f": {', '.join(sorted(set(reasons.values())))}" if reasons else ""
    return f"{type(model).__name__} has no {words} that could be quantized{why}."


def choose_formats(
    layers: Mapping[str, nn.Module], inputs: Mapping[str, LayerInput], edges: Mapping[str, str], options: Rounding
) -> tuple[dict[str, Format], dict[str, str]]:
    """The format of each Linear or Conv2d: as asked, but 8 bits where an error would reach everything, and why.

    A conditioning layer sees one row an image, so leaving its input in float costs nothing; the first and last layers, the
    `edges` (see `data_flow`), are small.
    """
    formats: dict[str, Format] = {}
    reasons: dict[str, str] = {}
    for name, layer in layers.items():
        why = "conditioning" if inputs[name].conditioning else edges.get(name)
        if why is not None:
            formats[name] = weights_only(layer, HIGH_BITS, EDGE_GROUP if name in edges else None)
            reasons[name] = f"{why} layer: weights in {HIGH_BITS} bits, inputs in float"
        elif options.activation_bits is None:
            formats[name] = weights_only(layer, options.weights, options.group_size)
        else:
            formats[name] = Format(options.weights, options.activation_bits, None, options.format == "float8")
    return formats, reasons


def weights_only(layer: nn.Module, bits: int, group_size: int | None = None) -> Format:
    """Rounded weights with one scale for each output channel, or for groups of columns."""
    columns = layer.weight[0].numel()  # type: ignore[union-attr, operator, index]
    return Format(bits, None, min(group_size or columns, columns))


def high_format(format: Format) -> Format:
    """The same with 8 bits for weights and, where they are rounded, inputs."""
    return replace(format, weight_bits=HIGH_BITS, activation_bits=None if format.activation_bits is None else HIGH_BITS)


def stored_bits(layer: QuantizedLayer) -> int:
    """Bits that the weight of a layer takes, its scales counted."""
    return layer.codes.numel() * layer.format.weight_bits + 8 * layer.stored_scale().nbytes


def select_high_precision(
    gains: Mapping[str, float],
    low: Mapping[str, QuantizedLayer],
    high: Mapping[str, QuantizedLayer],
    effective_bits: float,
) -> list[str]:
    """Those of `low` that become as in `high`, by gain a bit, so that all average at most `effective_bits` a weight."""
    costs = {name: stored_bits(high[name]) - stored_bits(layer) for name, layer in low.items()}
    left = sum(layer.codes.numel() * effective_bits - stored_bits(layer) for layer in low.values())
    chosen = []
    for name in sorted(gains, key=lambda name: gains[name] / costs[name], reverse=True):
        if gains[name] > 0 and costs[name] <= left:
            chosen.append(name)
            left -= costs[name]
    return chosen


def select_float_activations(errors: Mapping[str, float], macs: Mapping[str, int], limit: float) -> list[str]:
    """Those of the layers of `errors` whose inputs stay in float, by error a multiplication; at most `limit` of these."""
    chosen = []
    for name in sorted(errors, key=lambda name: errors[name] / macs[name], reverse=True):
        if macs[name] <= limit:
            chosen.append(name)
            limit -= macs[name]
    return chosen
