"""Costs: packed layers count like the layers they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffpress.calibration.cost import operation_formulas, parameter_count
from diffpress.export.edits import Pack
from diffpress.export.runtime import StepClock, factorize_layer, pack_layer

FORMATS: dict[str, dict[str, Any]] = {
    "W8A8": {"weight_bits": 8, "activation_bits": 8},
    "W3A6": {"weight_bits": 3, "activation_bits": 6, "asymmetric": True},
    "W2 g16": {"weight_bits": 2, "activation_bits": None, "group_size": 16},
    "FP8": {"weight_bits": 8, "activation_bits": 8, "float8": True},
}
LAYERS = {
    "linear": (nn.Linear(63, 10), (2, 5, 63)),
    "convolution": (nn.Conv2d(5, 6, (3, 2), stride=2, padding=1, bias=False), (2, 5, 9, 8)),
}


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)
def test_packed_layers_cost_what_their_originals_do(
    layer: nn.Module, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    packed = pack_layer(layer, Pack(component="unet", module="a", **options), StepClock([1.0]))
    assert parameter_count(packed) == parameter_count(layer)
    assert flops(packed, shape) == flops(layer, shape) > 0


def flops(layer: nn.Module, shape: tuple[int, ...]) -> int:
    with FlopCounterMode(display=False, custom_mapping=operation_formulas()) as counter, torch.no_grad():
        layer(torch.ones(shape))
    return int(counter.get_total_flops())


def test_packed_embeddings_have_their_parameters() -> None:
    edit = Pack(component="text_encoder", module="a", **FORMATS["W2 g16"])
    assert parameter_count(pack_layer(nn.Embedding(7, 33), edit, None)) == 7 * 33


def test_factors_cost_what_they_are() -> None:
    factors = factorize_layer(nn.Linear(63, 10), 3)
    assert parameter_count(factors) == 3 * 63 + 10 * 3 + 10
    assert flops(factors, (2, 5, 63)) == 2 * 10 * (3 * 63 + 10 * 3)
