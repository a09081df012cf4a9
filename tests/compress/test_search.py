"""Rounding to nearest: searched, packed, measured."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffpress.calibration.observe import layer_matrix
from diffpress.compress.quantized_layer import Format, QuantizedLayer, call_with, smoothed
from diffpress.compress.result import QuantizationResult, edits_and_tensors
from diffpress.compress.search import round_weight
from diffpress.export.apply import apply_edits_
from diffpress.export.runtime import StepClock
from diffpress.export.source import source_tensors
from diffpress.kernels import FP8_MAX, quantize_dequantize

HALF_UNIT = torch.finfo(torch.float32).eps / 2
FORMATS: dict[str, dict[str, Any]] = {
    "W8A8": {},
    "W4A8": {"weights": 4},
    "W4A4": {"weights": 4, "activations": 4},
    "W4A4 plain": {"weights": 4, "activations": 4, "smoothing": False, "asymmetric": False, "per_step": False},
    "W3A6": {"weights": 3, "activations": 6},
    "W2A8": {"weights": 2},
    "W4 g8": {"weights": 4, "activations": "none", "group_size": 8},
    "W4 g64": {"weights": 4, "activations": "none"},
    "FP8": {"format": "float8"},
}
CONVOLUTIONS = {"keep": ["down_blocks.*", "up_blocks.*"]}
"""What is left of the UNets is a stem, a middle and a head: every kind of layer, in a fraction of the time."""
CASES = [("tiny_class", name, chosen) for name, chosen in FORMATS.items()]
CASES += [("tiny_pixels", name, {**FORMATS[name], **CONVOLUTIONS}) for name in ("W4A4", "W2A8", "W4 g8", "FP8")]
CASES += [("tiny_text", "W4A4", {**FORMATS["W4A4"], **CONVOLUTIONS})]


def packed_outputs(own: Any, found: QuantizationResult) -> dict[str, tuple[Tensor, Tensor]]:
    """What each packed layer was fed and answered in one run of the packed denoiser."""
    denoiser = copy.deepcopy(own.denoiser)
    edits, tensors = edits_and_tensors(found)
    apply_edits_(denoiser, edits, own.trajectories.timesteps)
    assert not denoiser.load_state_dict(
        {**source_tensors(own.source, own.source.denoiser), **tensors}, strict=False
    ).unexpected_keys
    outputs: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def look(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            outputs[name] = arguments[0], output

        return look

    for name in found.layers:
        denoiser.get_submodule(name).register_forward_hook(watch(name))
    calls = list(own.trajectories.calls())
    with torch.no_grad():
        denoiser(**calls[len(calls) // 2].inputs)
    return outputs


@pytest.mark.parametrize(("source", "name", "chosen"), CASES, ids=[f"{source} {name}" for source, name, _ in CASES])
def test_packed_layers_compute_what_fake_quantization_measures(
    source: str,
    name: str,
    chosen: dict[str, Any],
    recorded: Callable[[str], Any],
    quantized: Callable[..., QuantizationResult],
) -> None:
    """Layer by layer on the same input, against sums in float64 of the very numbers that fake quantization multiplies.

    A packed layer sums exactly where it sums integers (or products of few float8 numbers); what is left are float32
    roundings: of a value and of a weight (code times scale), of the two scales' product, the sum, its product with them,
    and the added bias: six half-units of what is summed in magnitude. One more for every term where sums are in float32.
    (Whole denoisers may not be held to this: one code that lands on the other side of a rounding boundary moves
    everything after it.)
    """
    own, found = recorded(source), quantized(source, **chosen)
    calls = list(own.trajectories.calls())
    clock = StepClock(own.trajectories.timesteps)
    clock.set(calls[len(calls) // 2].inputs["timestep"])
    outputs = packed_outputs(own, found)
    assert outputs.keys() == found.layers.keys()
    for module, quantization in found.layers.items():
        layer, (x, packed) = own.denoiser.get_submodule(module), outputs[module]
        weight = quantization.weight()
        if isinstance(layer, nn.Embedding):
            assert torch.equal(packed, call_with(layer, layer.forward, x, weight, None))
            continue
        rounded = quantization.rounded(smoothed(layer, x, quantization.smoothing), clock).double()
        bias = None if layer.bias is None else layer.bias.detach().double()
        simulated = call_with(layer, layer.forward, rounded, weight.double(), bias)
        magnitude = call_with(
            layer, layer.forward, rounded.abs(), weight.double().abs(), None if bias is None else bias.abs()
        )
        exact = quantization.activation_scale is not None and not quantization.format.float8
        roundings = 6 if exact else 6 + weight[0].numel()
        assert ((packed - simulated).abs() <= roundings * HALF_UNIT * magnitude).all(), module


def test_the_formats_above_do_meet_zero_points_smoothing_and_steps(
    quantized: Callable[..., QuantizationResult],
) -> None:
    found = quantized("tiny_class", **FORMATS["W4A4"]).layers.values()
    rounds = [layer for layer in found if layer.activation_scale is not None]
    assert any(layer.zero_point is not None for layer in rounds)
    assert any(layer.zero_point is None for layer in rounds)
    assert any(layer.smoothing is not None for layer in rounds)
    plain = quantized("tiny_class", **FORMATS["W4A4 plain"]).layers.values()
    assert all(layer.zero_point is None and layer.smoothing is None for layer in plain)
    for layer in plain:
        assert layer.activation_scale is None or len(layer.activation_scale.unique()) == 1


def test_steps_with_other_ranges_get_other_scales(
    recorded: Callable[[str], Any], quantized: Callable[..., QuantizationResult]
) -> None:
    tables = [
        layer.activation_scale
        for source in ("tiny_class", "tiny_pixels")
        for layer in quantized(
            source, **FORMATS["W4A4"], **(CONVOLUTIONS if source == "tiny_pixels" else {})
        ).layers.values()
        if layer.activation_scale is not None
    ]
    assert all(len(table) == len(recorded("tiny_class").trajectories.timesteps) for table in tables)
    assert any(len(table.unique()) > 1 for table in tables)


@pytest.mark.parametrize("layer", [nn.Linear(20, 6), nn.Conv2d(5, 6, (3, 2))], ids=["linear", "convolution"])
@pytest.mark.parametrize(
    "format",
    [Format(8, 8), Format(4, 4), Format(3, 6), Format(2, 8), Format(4, None, 8), Format(8, 8, None, True)],
    ids=str,
)
def test_rounded_weights_are_near_the_weights(layer: nn.Module, format: Format) -> None:
    matrix = layer_matrix(layer)
    smoothing = torch.linspace(0.5, 2, matrix.shape[1])
    codes, scale = round_weight(layer, format, smoothing.square(), smoothing)
    assert isinstance(layer.weight, Tensor)
    assert codes.shape == layer.weight.shape
    divided = (matrix / smoothing[None, :, None]).view(codes.shape)
    error = (QuantizedLayer(format, codes, scale).weight() - divided).abs().flatten(1)
    largest = divided.abs().flatten(1).amax(1, keepdim=True)
    if format.float8:
        # Three bits after the leading one; the smallest step is 2**-9 of a scale.
        bound = torch.maximum(divided.abs().flatten(1) * 2**-4, largest / FP8_MAX * 2**-10)
    else:
        # Searched scales clip down to 0.3 of the largest at 2 bits; that, or half a step, is what is lost at most, and what
        # float16 rounds a scale by.
        bound = largest * ({8: 0.2, 4: 0.5, 3: 0.6, 2: 0.7}[format.weight_bits] + 2**-11)
    assert (error <= bound * (1 + 4 * HALF_UNIT)).all()


def test_rounded_to_is_quantize_then_dequantize() -> None:
    values = torch.tensor([0.24, 0.26, -3.0, 9.0, 0.25])
    assert quantize_dequantize(values, torch.tensor([0.5]), 4).tolist() == [0.0, 0.5, -3.0, 3.5, 0.0]
    assert quantize_dequantize(values, torch.tensor([0.5]), 4, torch.tensor([-8.0])).tolist() == [
        0.0,
        0.5,
        0.0,
        7.5,
        0.0,
    ]
