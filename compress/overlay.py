"""Quantization as a removable overlay: the teacher's own modules, rounding while the overlay is on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpress.export.runtime import Attention, AttentionOverride, StepClock, attach_clock_
from diffpress.kernels import dequantize, spread_groups, to_fp8

from .rounding import fake_quantize


@dataclass(frozen=True)
class Format:
    """How the numbers of one layer are stored and computed with."""

    weight_bits: int
    activation_bits: int | None
    """None: weights only."""
    group_size: int | None = None
    """Columns of the weight that share a scale; None: all of a row."""
    float8: bool = False


@dataclass(frozen=True)
class QuantizedLayer:
    """How one layer is rounded; O output channels, C input channels, S steps, G groups of columns."""

    format: Format
    codes: Tensor
    """int8 or float8, in the shape of the weight."""
    weight_scale: Tensor
    """[O], or [O, G] where only weights are rounded."""
    activation_scale: Tensor | None = None
    """[S]"""
    zero_point: Tensor | None = None
    """[S] whole numbers."""
    smoothing: Tensor | None = None
    """[C] what inputs are multiplied by before they are rounded; the codes are of weights divided by it."""
    bias: Tensor | None = None
    """[O] where the method changed it."""

    def weight(self) -> Tensor:
        """The float32 weight that the codes stand for."""
        return dequantize(self.codes, broadcast_scale(self.weight_scale, self.codes.shape, self.format.group_size))

    def rounded(self, x: Tensor, clock: StepClock) -> Tensor:
        """What the codes of the (smoothed) input stand for, in float32."""
        if self.activation_scale is None:
            return x
        scale = clock.select(self.activation_scale.to(x.device))
        if self.format.float8:
            return to_fp8(x.float(), scale).float() * scale
        zero_point = None if self.zero_point is None else clock.select(self.zero_point.to(x.device)).round()
        assert self.format.activation_bits is not None
        return fake_quantize(x.float(), scale, zero_point, self.format.activation_bits)


@contextmanager
def fake_quantized(denoiser: nn.Module, layers: Mapping[str, QuantizedLayer], clock: StepClock) -> Iterator[None]:
    """Round the weights and inputs of the named layers in float while the context lasts; afterwards nothing has changed."""

    def call(layer: nn.Module, own: QuantizedLayer) -> Callable[[Tensor], Tensor]:
        weight = own.weight().to(layer.weight)  # type: ignore[arg-type]
        bias = own.bias if own.bias is not None else getattr(layer, "bias", None)
        return lambda x: run_layer(layer, own.rounded(smoothed(layer, x, own.smoothing), clock).to(x), weight, bias)

    with overlaid(denoiser, {name: call(denoiser.get_submodule(name), own) for name, own in layers.items()}, clock):
        yield


@contextmanager
def overlaid(denoiser: nn.Module, calls: Mapping[str, Callable[..., Any]], clock: StepClock) -> Iterator[None]:
    """Let `calls` answer for the named modules while the context lasts, `clock` following the denoiser's time step."""
    handle = attach_clock_(denoiser, clock)
    modules = [denoiser.get_submodule(name) for name in calls]
    for module, call in zip(modules, calls.values(), strict=True):
        # An attribute of the instance stands before the method of its class.
        module.__dict__["forward"] = call
    try:
        yield
    finally:
        handle.remove()
        for module in modules:
            del module.__dict__["forward"]


def overriding_attention(denoiser: nn.Module, attention: Mapping[str, Attention]) -> dict[str, Callable[..., Any]]:
    """Calls to overlay: the named modules as they are, but with their attention answered by `attention`."""
    return {name: AttentionOverride(denoiser.get_submodule(name).forward, answer) for name, answer in attention.items()}


def broadcast_scale(weight_scale: Tensor, shape: torch.Size, group_size: int | None) -> Tensor:
    """The scales [O] or [O, G] of a weight's rows or groups of columns, so that they broadcast against that weight."""
    if group_size is None:
        return weight_scale.view(-1, *[1] * (len(shape) - 1))
    return spread_groups(weight_scale, group_size, shape[1:].numel()).reshape(shape)


def smoothed(layer: nn.Module, x: Tensor, smoothing: Tensor | None) -> Tensor:
    """The input of a Linear [..., C] or Conv2d [B, C, H, W] with every channel multiplied by its entry of `smoothing` [C]."""
    if smoothing is None:
        return x
    return x * (smoothing[:, None, None] if isinstance(layer, nn.Conv2d) else smoothing).to(x)


def run_layer(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a Linear, Conv2d or Embedding of this geometry answers with another weight and bias."""
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    return F.embedding(x, weight) if isinstance(layer, nn.Embedding) else F.linear(x, weight, bias)
