"""How far two engines may be apart that both compute right: derived from formats and lengths of sums, never measured.

An engine adds floats in its own order and rounds each time. Sums of products of codes are exact. Where a value lies
within rounding of the edge between two codes, engines may choose either; nothing else may move a code.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpress.kernels import code_range, dequantize_groups, quantize, to_fp8
from diffpress.kernels.int8_attention.reference import LARGEST_CODE

from ..runtime import BufferedLinear, Int8Attention, PackedConv2d, PackedEmbedding, PackedLayer, attention_overrides
from .clocks import EPSILON, scale_now, scale_rounding, zero_now
from .part import packed_layers

EPILOGUE = 8
"""Roundings of scales, of their product with a sum, of the bias and of what is added to it, at most."""


def model_rounding(module: nn.Module, latest: float = 0.0) -> float:
    """Relative root mean square by which a model's floats may differ, given the same codes: every layer adds its own.

    A time step of `latest` is an angle of a sine, and rounded as one: it adds itself.
    """
    count = len(_float_weights(module)) + len(packed_layers(module)) + len(attention_overrides(module))
    return count * layer_rounding(module) + latest * EPSILON


def layer_rounding(module: nn.Module) -> float:
    """The same of one layer with what stands around it: the square root of its sums' length, and a few more roundings.

    Higham and Mary 2019, A new approach to probabilistic rounding error analysis, doi 10.1137/18M1226312.
    """
    lengths = [weight[0].numel() for weight in _float_weights(module)]
    longest = max(lengths + [layer.columns for layer in packed_layers(module)], default=1)
    return (math.sqrt(longest) + EPILOGUE) * EPSILON


def _float_weights(module: nn.Module) -> list[Tensor]:
    buffered = (layer.weight for layer in module.modules() if isinstance(layer, BufferedLinear))
    return [weight for weight in (*module.parameters(), *buffered) if weight.ndim > 1]


def layer_bound(layer: PackedLayer, x: Tensor, output: Tensor) -> Tensor:
    """The most, at every element, that another engine's output for the same input `x` may differ from `output`.

    The epilogue's roundings, sums of floats where the layer has such, and one code of each input at an edge.
    """
    bias = 0 if layer.bias is None else _over_outputs(layer, layer.bias.abs())
    rounding = EPILOGUE * EPSILON + scale_rounding(layer)
    bound = rounding * (output.abs() + 2 * bias)
    if isinstance(layer, PackedEmbedding):
        return bound
    x = smoothed(layer, x)
    if layer.edit.float8 or layer.activation_scale is None:
        bound = bound + math.sqrt(layer.columns) * EPSILON * _magnitudes(layer, x.abs())
    if layer.activation_scale is None:
        return bound
    low, high = (codes(layer, x * (1 + sign * rounding)) for sign in (-1, 1))
    return bound + _magnitudes(layer, (high - low).abs() * scale_now(layer))


def smoothed(layer: PackedLayer, x: Tensor) -> Tensor:
    """What a layer rounds."""
    if layer.smoothing is None:
        return x
    return x * (layer.smoothing[:, None, None] if isinstance(layer, PackedConv2d) else layer.smoothing)


def codes(layer: PackedLayer, x: Tensor) -> Tensor:
    """The codes of an input that is smoothed, in float."""
    if layer.edit.float8:
        return to_fp8(x, scale_now(layer)).float()
    assert layer.edit.activation_bits is not None
    return quantize(x, scale_now(layer), layer.edit.activation_bits, zero_now(layer)).float()


def _magnitudes(layer: PackedLayer, x: Tensor) -> Tensor:
    """|W| x: the layer with the magnitudes of its weights, in floats and without a bias."""
    weights = layer.weight.float() if layer.edit.float8 or layer.edit.group_size is None else None
    if weights is None:
        assert layer.edit.group_size is not None
        weights = dequantize_groups(layer.weight, layer.weight_scale, layer.edit.group_size)
    else:
        weights = weights * layer.weight_scale[:, None]
    if not isinstance(layer, PackedConv2d):
        return F.linear(x, weights.abs())
    kernel = weights.abs().view(len(weights), layer.in_channels, *layer.kernel_size)
    return F.conv2d(x, kernel, None, layer.stride, layer.padding, layer.dilation)


def _over_outputs(layer: PackedLayer, values: Tensor) -> Tensor:
    return values[:, None, None] if isinstance(layer, PackedConv2d) else values


def attention_bound(attention: Int8Attention, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> Tensor:
    """The same for attention on integers: the mean of the keys may move a key's code, and a score a probability's.

    With scores moved by e, probabilities p change by p (exp(2 e) - 1) at most and their sum by as much in all.
    """
    scores, moved = _scores(query, key)
    if not attention.integer_values:
        weights = scores.softmax(3)
        change, values = weights * torch.expm1(2 * moved), value
    else:
        powers, moved = (scores - scores.amax(3, keepdim=True)), moved + moved.amax(3, keepdim=True)
        low, weights, high = (
            (LARGEST_CODE * torch.exp(powers + sign * moved)).round().clamp(max=LARGEST_CODE) for sign in (-1, 0, 1)
        )
        total = weights.sum(3, keepdim=True)
        weights, change = weights / total, (high - low) / total
        channel = token_scales(value.transpose(2, 3)).transpose(2, 3)
        values = quantize(value, channel, 8) * channel
    rounding = (EPILOGUE + math.sqrt(key.shape[2])) * EPSILON
    magnitudes = weights @ values.abs()
    change_of_sum = change.sum(3, keepdim=True)
    moved_values = change @ values.abs() + change_of_sum * output.abs()
    return moved_values / (1 - change_of_sum).clamp(min=EPSILON) + rounding * magnitudes


def _scores(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [B, H, T, S] of codes, and how far other engines' may be off, with the keys' codes that may be others."""
    mean = key.mean(2, keepdim=True)
    # A sum of S keys, rounded in another order, over S.
    shift = (EPILOGUE + math.sqrt(key.shape[2])) * EPSILON * key.abs().mean(2, keepdim=True)
    smooth = key - mean
    q_scale, k_scale = token_scales(query), token_scales(smooth)
    q_codes, k_codes = quantize(query, q_scale, 8).float(), quantize(smooth, k_scale, 8).float()
    relative = (shift.amax(3, keepdim=True) / (LARGEST_CODE * k_scale)) + EPILOGUE * EPSILON
    edge = shift + smooth.abs() * relative
    low, high = (quantize(smooth + sign * edge, k_scale, 8).float() for sign in (-1, 1))
    factor = q_scale * query.shape[3] ** -0.5
    scores = (q_codes @ k_codes.transpose(2, 3)) * factor * k_scale.transpose(2, 3)
    moved = (q_codes.abs() @ (high - low).transpose(2, 3)) * factor * k_scale.transpose(2, 3)
    largest = scores.abs().amax(3, keepdim=True)
    return scores, moved + scores.abs() * relative.transpose(2, 3) + EPILOGUE * EPSILON * (1 + largest)


def token_scales(x: Tensor) -> Tensor:
    """Scales [B, H, T, 1] of tokens [B, H, T, D] in attention."""
    found = x.abs().amax(3, keepdim=True) / code_range(8)[1]
    return found.where(found > 0, 1)
