"""Quantization as a removable overlay: the teacher's own modules, rounding while the overlay is on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from diffpress.calibration.observe import rounded_to
from diffpress.export.runtime import StepClock, attach_clock_
from diffpress.kernels import dequantize


@dataclass(frozen=True)
class Quantization:
    """How one layer is rounded; O output channels, S steps."""

    weight_bits: int
    activation_bits: int
    codes: Tensor
    """int8, in the shape of the weight."""
    weight_scale: Tensor
    """[O]"""
    activation_scale: Tensor
    """[S]"""

    def weight(self) -> Tensor:
        """The float32 weight the codes stand for."""
        return dequantize(self.codes, self.weight_scale.view(-1, *[1] * (self.codes.ndim - 1)))


@contextmanager
def fake_quantized(denoiser: nn.Module, layers: Mapping[str, Quantization], clock: StepClock) -> Iterator[None]:
    """Round the weights and inputs of the named layers in float while the context lasts; afterwards nothing has changed."""
    with ExitStack() as stack:
        stack.callback(attach_clock_(denoiser, clock).remove)
        for name, quantization in layers.items():
            stack.enter_context(_fake_quantized_layer(denoiser.get_submodule(name), quantization, clock))
        yield


@contextmanager
def _fake_quantized_layer(layer: nn.Module, quantization: Quantization, clock: StepClock) -> Iterator[None]:
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)

    def round_input(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = arguments[0]
        scale = clock.select(quantization.activation_scale.to(x.device))
        return (rounded_to(x.float(), scale, quantization.activation_bits).to(x.dtype), *arguments[1:])

    original = weight.data
    weight.data = quantization.weight().to(original)
    handle = layer.register_forward_pre_hook(round_input)
    try:
        yield
    finally:
        handle.remove()
        weight.data = original
