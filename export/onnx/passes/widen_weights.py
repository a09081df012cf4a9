"""Weights in less than 8 bits to int8: before the trace, since a graph has no operator that unpacks them."""

from __future__ import annotations

from torch import nn

from diffpress.kernels import unpack_codes

from ..part import packed_layers


def widen_weights_(module: nn.Module) -> bool:
    """Store the integer weights of packed layers as int8, with the same values; returns whether any was another.

    1. Weights of 2, 3 and 4 bits become int8, and their layer says so.
    2. Weights of 8 bits, integers or float8, stay as they are.
    """
    layers = [layer for layer in packed_layers(module) if layer.edit.weight_bits < 8]
    for layer in layers:
        layer.weight = unpack_codes(layer.weight, layer.columns, layer.edit.weight_bits)
        layer.edit = layer.edit.model_copy(update={"weight_bits": 8})
    return bool(layers)
