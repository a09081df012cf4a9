"""One layer as it is going to be stored: how it is rounded, and what it answers then, in float."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffpress.export.runtime import Forward, StepClock, Wrap
from diffpress.kernels import dequantize, spread_groups, to_fp8

from .overlay import overlaid
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
    """[O], or [O, G] where only weights are rounded; float32 that float16 holds, unless it is out of its reach."""
    activation_scale: Tensor | None = None
    """[S]"""
    zero_point: Tensor | None = None
    """[S] whole numbers."""
    smoothing: Tensor | None = None
    """[C] what inputs are multiplied by before they are rounded; the codes are of weights divided by it."""
    bias: Tensor | None = None
    """[O] where the method changed it."""

    def stored_scale(self) -> Tensor:
        """The weight's scales as they are stored: in float16 where that is exact."""
        half = self.weight_scale.half()
        return half if torch.equal(half.float(), self.weight_scale) else self.weight_scale

    def weight(self) -> Tensor:
        """The float32 weight that the codes stand for, [O, C] or [O, C, height, width]."""
        return dequantize(self.codes, broadcast_scale(self.weight_scale, self.codes.shape, self.format.group_size))

    def rounded(self, x: Tensor, clock: StepClock) -> Tensor:
        """What the codes of the (smoothed) input stand for, in float32 and its shape: [..., C] or [B, C, H, W]."""
        if self.activation_scale is None:
            return x
        scale = clock.select(self.activation_scale.to(x.device))
        if self.format.float8:
            return to_fp8(x.float(), scale).float() * scale
        zero_point = None if self.zero_point is None else clock.select(self.zero_point.to(x.device)).round()
        assert self.format.activation_bits is not None
        return fake_quantize(x.float(), scale, zero_point, self.format.activation_bits)


def fake_quantization(layer: nn.Module, quantized: QuantizedLayer, clock: StepClock) -> Wrap:
    """Around the forward of `layer`: its weight and its input rounded, in float."""
    weight = quantized.weight().to(layer.weight)  # type: ignore[arg-type]
    bias = quantized.bias if quantized.bias is not None else getattr(layer, "bias", None)

    def wrap(beneath: Forward) -> Forward:
        def forward(x: Tensor) -> Tensor:
            return call_with(
                layer, beneath, quantized.rounded(smoothed(layer, x, quantized.smoothing), clock).to(x), weight, bias
            )

        return forward

    return wrap


@contextmanager
def fake_quantized(denoiser: nn.Module, layers: Mapping[str, QuantizedLayer], clock: StepClock) -> Iterator[None]:
    """Round the weights and inputs of the named layers in float while the context lasts; afterwards nothing has changed."""
    wraps = {
        name: fake_quantization(denoiser.get_submodule(name), quantized, clock) for name, quantized in layers.items()
    }
    with overlaid(denoiser, wraps, clock):
        yield


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


def call_with(layer: nn.Module, forward: Forward, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `forward` of a Linear, Conv2d or Embedding answers to `x` while the layer holds another weight and bias [O].

    The forward is called, rather than its operation: what an earlier stage has laid around it takes part.
    """
    held = dict(layer._parameters)
    layer._parameters.update({"weight": weight, "bias": bias} if "bias" in held else {"weight": weight})  # type: ignore[dict-item]
    try:
        return forward(x)
    finally:
        layer._parameters.update(held)
