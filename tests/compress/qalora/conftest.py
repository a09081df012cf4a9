"""Made-up layers under training, and training_data on a tiny pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from diffpress.calibration.conditions import conditions
from diffpress.calibration.observe import layer_matrix
from diffpress.compress.options import Qalora
from diffpress.compress.qalora import StudentRollouts
from diffpress.compress.quantized_layer import Format, QuantizedLayer
from diffpress.compress.result import QuantizationResult
from diffpress.compress.search import round_weight
from diffpress.kernels import code_range

TIMESTEPS = [8.0, 4.0, 0.0]
"""Dyadic, so that a quarter of the way is exact in floats."""
IMAGES = 8
"""That a round of own runs makes; there are as many conditions."""


class Toy(nn.Module):
    """One layer that is told the time step, as a denoiser is."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, timestep: Tensor | float) -> Tensor:
        return self.layer(x)


class Case(NamedTuple):
    toy: Toy
    start: QuantizedLayer
    x: Tensor


LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (nn.Linear(20, 7), torch.randn(6, 5, 20)),
    "linear without bias": lambda: (nn.Linear(20, 7, bias=False), torch.randn(6, 20)),
    "convolution": lambda: (nn.Conv2d(5, 7, (3, 2), stride=2, padding=1), torch.randn(6, 5, 9, 8)),
    "1x1 convolution": lambda: (nn.Conv2d(5, 7, 1), torch.randn(6, 5, 4, 4)),
}
FORMATS: dict[str, tuple[Format, bool, bool]] = {
    "W8A8": (Format(8, 8), False, False),
    "W4A4": (Format(4, 4), False, False),
    "W4A4 asymmetric": (Format(4, 4), True, False),
    "W3A6 asymmetric, smoothed": (Format(3, 6), True, True),
    "W2A8 smoothed": (Format(2, 8), False, True),
    "W4 g8": (Format(4, None, 8), False, False),
}


@pytest.fixture(params=[(layer, form) for layer in LAYERS for form in FORMATS], ids=", ".join)
def case(request: pytest.FixtureRequest) -> Case:
    """Every kind of layer in every format, with scales that `exp` and `log` give back as they were (see `settled`)."""
    layer, form = request.param
    return make_case(layer, form)


@pytest.fixture
def named_case() -> Callable[[str, str], Case]:
    """A function: one such layer in one such format."""
    return make_case


def make_case(layer_name: str, form: str) -> Case:
    torch.manual_seed(0)
    layer, x = LAYERS[layer_name]()
    format, asymmetric, smooth = FORMATS[form]
    channels = layer_matrix(layer).shape[1]
    smoothing = torch.linspace(0.5, 2, channels)[torch.randperm(channels)] if smooth else torch.ones(channels)
    codes, scale = round_weight(layer, format, torch.ones(channels), smoothing)
    table = zero = None
    if format.activation_bits is not None:
        low, high = code_range(format.activation_bits)
        table = settled(torch.tensor([2.0, 3.0, 2.5]) / high)
        zero = torch.tensor([low // 2, 0.0, 1.0]) if asymmetric else None
    own = QuantizedLayer(format, codes, scale, table, zero, smoothing if smooth else None)
    return Case(Toy(layer), own, x)


def settled(scale: Tensor) -> Tensor:
    """The nearest scales that survive being kept as logarithms: repeated, exp(log(s)) comes to rest."""
    for _ in range(100):
        scale = scale.log().exp()
    assert torch.equal(scale, scale.log().exp())
    return scale


@pytest.fixture
def school(
    recorded: Callable[[str], Any], quantized: Callable[..., QuantizationResult], tmp_path: Path
) -> Callable[..., tuple[Any, QuantizationResult, StudentRollouts, Qalora]]:
    """A function: what learning needs, on the named pipeline: recorded runs, where it starts, own runs, options."""

    def prepare(
        source: str = "tiny_class", folder: str = "learned", keep: tuple[str, ...] = (), **chosen: Any
    ) -> tuple[Any, QuantizationResult, StudentRollouts, Qalora]:
        rounding = {
            "weights": chosen.pop("weights", 3),
            "activations": chosen.pop("activations", 4),
            "keep": list(keep),
            "gptq": chosen.pop("gptq", True),
        }
        own = recorded(source)
        first = quantized(source, **rounding)
        found = QuantizationResult(first.component, dict(first.layers), dict(first.reasons), dict(first.sensitivity))
        wanted = conditions(own.pipeline, "builtin", IMAGES + 2, 1000)
        runs = StudentRollouts(own.pipeline, wanted[2:], wanted[:2], own.sampling, tmp_path / folder, IMAGES)
        settings = {"rank": 4, "iterations": 4, "batch": 4, "validation_images": 2, **chosen}
        return own, found, runs, Qalora(method="qalora", **rounding, **settings)

    return prepare
