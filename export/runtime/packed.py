"""Linear and Conv2d as they are stored: integer weights, one activation scale a step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffpress.kernels import quantized_conv2d, quantized_linear

from ..edits import Pack
from .clock import StepClock


class PackedLayer(nn.Module):
    """The tensors of a `Pack` edit; `clock` says which entry of the activation scales holds now."""

    weight: Tensor
    weight_scale: Tensor
    activation_scale: Tensor
    bias: Tensor | None

    def __init__(self, edit: Pack, clock: StepClock, rows: int, columns: int, has_bias: bool) -> None:
        super().__init__()
        self.weight_bits, self.activation_bits, self.clock = edit.weight_bits, edit.activation_bits, clock
        stored = (torch.int8, columns) if edit.weight_bits == 8 else (torch.uint8, (columns + 1) // 2)
        self.register_buffer("weight", torch.zeros(rows, stored[1], dtype=stored[0]))
        self.register_buffer("weight_scale", torch.ones(rows))
        self.register_buffer("activation_scale", torch.ones(len(clock.timesteps)))
        self.register_buffer("bias", torch.zeros(rows) if has_bias else None)

    def extra_repr(self) -> str:
        return f"weight_bits={self.weight_bits}, activation_bits={self.activation_bits}"


class PackedLinear(PackedLayer):
    """[..., in] to [..., out]."""

    def __init__(self, layer: nn.Linear, edit: Pack, clock: StepClock) -> None:
        super().__init__(edit, clock, layer.out_features, layer.in_features, layer.bias is not None)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        scale = self.clock.select(self.activation_scale)
        return quantized_linear(
            x, self.weight, self.weight_scale, scale, self.bias, self.weight_bits, self.activation_bits
        )


class PackedConv2d(PackedLayer):
    """[B, in, H, W] to [B, out, H', W']."""

    def __init__(self, layer: nn.Conv2d, edit: Pack, clock: StepClock) -> None:
        columns = layer.weight[0].numel()
        super().__init__(edit, clock, layer.out_channels, columns, layer.bias is not None)
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride = layer.kernel_size, layer.stride
        self.padding, self.dilation = layer.padding, layer.dilation

    def forward(self, x: Tensor) -> Tensor:
        return quantized_conv2d(
            x,
            self.weight,
            self.weight_scale,
            self.clock.select(self.activation_scale),
            self.bias,
            self.kernel_size,
            self.stride,
            self.padding,  # type: ignore[arg-type]  # why_not_packable refuses the string forms
            self.dilation,
            self.weight_bits,
            self.activation_bits,
        )


def why_not_packable(layer: nn.Module) -> str | None:
    """The reason why a layer cannot be packed, or None where it can."""
    if isinstance(layer, nn.Conv2d):
        if layer.groups != 1:
            return f"grouped convolution ({layer.groups} groups)"
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return (
                f"convolution with padding {layer.padding_mode if layer.padding_mode != 'zeros' else layer.padding!r}"
            )
        return None
    return None if isinstance(layer, nn.Linear) else f"{type(layer).__name__} is neither Linear nor Conv2d"


def pack_layer(layer: nn.Module, edit: Pack, clock: StepClock) -> PackedLayer:
    """The empty packed form of `layer`. Raises ValueError where it has none."""
    reason = why_not_packable(layer)
    if reason is not None:
        raise ValueError(f"{edit.module} cannot be packed: {reason}")
    if isinstance(layer, nn.Linear):
        return PackedLinear(layer, edit, clock)
    assert isinstance(layer, nn.Conv2d)
    return PackedConv2d(layer, edit, clock)
