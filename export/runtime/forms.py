"""What decides how long a packed layer takes, and a layer that stands for all of one form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from diffpress.kernels import code_range, pack_codes

from .clock import StepClock
from .packed import PackedConv2d, PackedLayer, PackedLinear, pack_layer

if TYPE_CHECKING:
    from ..edits import Pack

ROWS, CHANNELS, SIDE = 1024, 1024, 32
"""The most rows, channels and pixels of a side that are told apart: beyond them neither way gains on the other."""
WIDE = 2**14
"""And the most channels times pixels of a side: with many channels small images differ, where floats wait for their weights."""


class LayerUse(BaseModel):
    """What one packed layer was given while one image was made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: tuple[int, ...]
    """The largest shape: [..., in], or [B, in, H, W]."""
    calls: int


@dataclass(frozen=True)
class LayerForm:
    """Layers of one kind, format and class of shapes, whose sizes are powers of two."""

    edit: Pack
    """Of no module."""
    shape: tuple[int, ...]
    """Of the input: [rows, in], or [B, in, H, W]."""
    outputs: int
    dtype: torch.dtype
    geometry: tuple[tuple[int, ...], ...] = ()
    """Of a convolution its kernel size, stride, padding and dilation."""

    def words(self) -> str:
        """Such as `W4A8 linear [1024, 256] x 1024`."""
        kernel = f"conv {'x'.join(map(str, self.geometry[0]))}" if self.geometry else "linear"
        return f"{self.edit.words()} {kernel} {list(self.shape)} x {self.outputs}"

    def key(self) -> str:
        """Unlike that of any other form."""
        zero = " with zero point" if self.edit.asymmetric else ""
        return f"{self.words()}{zero} {str(self.dtype).removeprefix('torch.')} {self.geometry[1:]}"

    def layer(self) -> PackedLayer:
        """One of this form, with codes as weights have them: some kernels are slower for large ones."""
        # On the meta device, where it draws no random numbers.
        if self.geometry:
            plain: nn.Module = nn.Conv2d(self.shape[1], self.outputs, *self.geometry, device="meta")  # type: ignore[arg-type]
        else:
            plain = nn.Linear(self.shape[1], self.outputs, device="meta")
        edit = self.edit
        layer = pack_layer(plain, edit, StepClock((0.0,)) if edit.per_step() else None)
        low, high = code_range(edit.weight_bits)
        codes = _normal(self.outputs, layer.columns).mul(high / 3).round().clamp(low, high)
        layer.weight = (
            codes.to(layer.weight.dtype) if edit.float8 else pack_codes(codes.to(torch.int8), edit.weight_bits)
        )
        if layer.activation_scale is not None and edit.activation_bits is not None:
            layer.activation_scale.fill_(3 / code_range(edit.activation_bits)[1])
        assert layer.bias is not None
        layer.bias.data = layer.bias.data.to(self.dtype)
        return layer

    def input(self) -> Tensor:
        """What that layer may be given."""
        return _normal(*self.shape).to(self.dtype)


def _normal(*shape: int) -> Tensor:
    """The same numbers every time, and none of torch's own generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def form_of(layer: PackedLayer, use: LayerUse, dtype: torch.dtype) -> LayerForm | None:
    """The form of a layer that is given inputs of `dtype`; None of an embedding, which has but one way to run."""
    edit = layer.edit.model_copy(update={"component": "", "module": "", "smoothed": False})
    if isinstance(layer, PackedLinear):
        rows = _class(math.prod(use.input[:-1]), ROWS)
        return LayerForm(edit, (rows, _class(layer.in_features, CHANNELS)), _class(layer.out_features, CHANNELS), dtype)
    if isinstance(layer, PackedConv2d):
        geometry = tuple(
            tuple(map(int, own)) for own in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        )
        windows = [step * (size - 1) + 1 for size, step in zip(layer.kernel_size, layer.dilation, strict=True)]
        sides = [max(_class(size, SIDE), window) for size, window in zip(use.input[2:], windows, strict=True)]
        batch = _class(use.input[0], max(1, ROWS // math.prod(sides)))
        most = min(CHANNELS, WIDE // max(sides))
        channels, outputs = (_class(size, most) for size in (layer.in_channels, layer.out_channels))
        return LayerForm(edit, (batch, channels, *sides), outputs, dtype, geometry)
    return None


def _class(size: int, most: int) -> int:
    """The power of two that is nearest, `most` at most."""
    return min(most, 2 ** round(math.log2(max(size, 1))))
