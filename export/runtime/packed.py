"""Linear, Conv2d and Embedding as they are stored: weights in few bits, one activation scale a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpress.kernels import (
    dequantize,
    dequantize_groups,
    fp8_conv2d,
    fp8_linear,
    packed_form,
    quantized_conv2d,
    quantized_linear,
    unpack_codes,
    weight_only_conv2d,
    weight_only_linear,
)
from diffpress.kernels.processor import fast_dtype

from .clock import StepClock
from .exact import ExactTensors, cast_by
from .merging import TINY, packed_anew

if TYPE_CHECKING:
    from ..edits import Pack


class Operations(NamedTuple):
    """What computes one kind of layer in each format."""

    integers: Callable[..., Tensor]
    weight_only: Callable[..., Tensor]
    float8: Callable[..., Tensor]


FLOATS = "expanded"
"""What the buffer of an expanded weight is called."""
EXACT = ("weight", "weight_scale", "activation_scale", "zero_point", "smoothing")
"""Tensors of a packed layer whose dtype nobody may change."""
LINEAR = Operations(quantized_linear, weight_only_linear, fp8_linear)
CONV2D = Operations(quantized_conv2d, weight_only_conv2d, fp8_conv2d)


class PackedLayer(ExactTensors):
    """The tensors of a `Pack` edit, in the shapes said there; `clock` says which entry of the tables over steps holds now."""

    weight: Tensor
    weight_scale: Tensor
    activation_scale: Tensor | None
    zero_point: Tensor | None
    smoothing: Tensor | None
    bias: Tensor | None

    def __init__(
        self, edit: Pack, clock: StepClock | None, rows: int, columns: int, channels: int = 0, has_bias: bool = False
    ) -> None:
        """The weight is [rows, columns] before it is packed; the input has `channels`."""
        super().__init__()
        self.edit, self.clock, self.columns = edit, clock, columns
        self.float_shape: Sequence[int] = (rows, columns)
        dtype, length = (torch.float8_e4m3fn, columns) if edit.float8 else packed_form(columns, edit.weight_bits)
        groups = () if edit.group_size is None else (-(-columns // edit.group_size),)
        steps = 0 if clock is None else len(clock.timesteps)
        self.register_buffer("weight", torch.zeros(rows, length, dtype=dtype))
        # Transformers builds its models in the dtype that is asked for.
        ones = partial(torch.ones, dtype=torch.float32)
        self.register_buffer("weight_scale", ones(rows, *groups))
        self.register_buffer("activation_scale", None if edit.activation_bits is None else ones(steps))
        self.register_buffer("zero_point", torch.zeros(steps, dtype=torch.float32) if edit.asymmetric else None)
        self.register_buffer("smoothing", ones(channels) if edit.smoothed else None)
        # A parameter, for a pipeline asks those of its models which precision to compute in.
        self.register_parameter("bias", nn.Parameter(torch.zeros(rows), requires_grad=False) if has_bias else None)

    @property
    def floats(self) -> Tensor | None:
        """The weight that an expanded layer computes with; it is not stored."""
        return self._buffers.get(FLOATS)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, {self.columns}, {self.edit.words()}"

    def expand_(self, dtype: torch.dtype) -> None:
        """From now on compute in floats, as fast as a layer that was never packed; inputs are of `dtype`, and not rounded.

        What is stored stays beside. Whoever casts the layer later has it expanded in that dtype, whoever moves it to
        another device has it packed again. See `expansion.py`.
        """
        weight = self._float_weight().to(dtype).to(fast_dtype(self.weight.new_empty(0, dtype=dtype)))
        # A buffer that is there only while it is wanted: accelerate trips over one that is None and not stored.
        self.register_buffer(FLOATS, weight.view(self.float_shape), persistent=False)

    def add_(self, delta: Tensor) -> float:
        """Add `delta`, of the shape of the weight in floats, and round to codes again.

        Gives what rounding changes, as a share of `delta`, by square means. Weight and scale are new tensors, so that who
        holds the old ones can put them back.
        """
        before, added = self._float_weight(), delta.float().view(len(self.weight), -1)
        wanted = before + added
        factors = self._smoothing_by_column()
        stored = wanted if factors is None else wanted / factors
        weight, scale = packed_anew(stored, self.edit, self.weight_scale)
        self.put_(weight, scale)
        return float((self._float_weight() - wanted).norm() / added.norm().clamp(min=TINY))

    def put_(self, weight: Tensor, scale: Tensor) -> None:
        """Compute with another weight from now on, of the same form."""
        self.weight, self.weight_scale = weight, scale
        if self.floats is not None:
            self.expand_(self.floats.dtype)

    def _smoothing_by_column(self) -> Tensor | None:
        smoothing = self.smoothing
        return None if smoothing is None else smoothing.repeat_interleave(self.columns // len(smoothing))

    def _float_weight(self) -> Tensor:
        """The weight [rows, columns] in float32, with the factors that the input is smoothed by."""
        if self.edit.float8:
            values = dequantize(self.weight, self.weight_scale[:, None])
        else:
            codes = unpack_codes(self.weight, self.columns, self.edit.weight_bits)
            values = dequantize_groups(
                codes, self.weight_scale.view(len(codes), -1), self.edit.group_size or self.columns
            )
        factors = self._smoothing_by_column()
        return values if factors is None else values * factors

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.floats
        super()._apply(fn, recurse)
        after = self.floats
        if before is not None and after is not None:
            if before.device != after.device:
                delattr(self, FLOATS)
            elif before.dtype != after.dtype:
                self.expand_(after.dtype)
        return self

    def exact_tensors(self) -> tuple[str, ...]:
        """All but the bias."""
        return EXACT

    def compute(self, x: Tensor, operations: Operations, *geometry: Sequence[int]) -> Tensor:
        """The layer's output [..., out] or [B, out, H', W'] from an input [..., in] or [B, in, H, W], smoothed already."""
        # Read here, as a module looks for its attributes for as long as a small layer takes.
        edit, clock, tensors, bias = self.edit, self.clock, self._buffers, self._parameters["bias"]
        weight, scales, zero_points = (
            (tensors["weight"], tensors["weight_scale"]),
            tensors["activation_scale"],
            tensors["zero_point"],
        )
        if clock is None or scales is None:
            return operations.weight_only(x, *weight, bias, *geometry, edit.weight_bits, edit.group_size)
        scale = clock.select(scales)
        if edit.float8:
            return operations.float8(x, *weight, scale, bias, *geometry)
        zero = None if zero_points is None else clock.select_code(zero_points)
        return operations.integers(x, *weight, scale, zero, bias, *geometry, edit.weight_bits, edit.activation_bits)


class PackedLinear(PackedLayer):
    """[..., in] to [..., out]."""

    def __init__(self, layer: nn.Linear, edit: Pack, clock: StepClock | None) -> None:
        columns = layer.in_features
        super().__init__(edit, clock, layer.out_features, columns, columns, layer.bias is not None)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        weight = self._buffers.get(FLOATS)
        if weight is not None:
            return _in_floats(F.linear, x, weight, self.bias)
        return self.compute(_smoothed(x, self.smoothing), LINEAR)


class PackedConv2d(PackedLayer):
    """[B, in, H, W] to [B, out, H', W']."""

    def __init__(self, layer: nn.Conv2d, edit: Pack, clock: StepClock | None) -> None:
        columns = layer.weight[0].numel()
        super().__init__(edit, clock, layer.out_channels, columns, layer.in_channels, layer.bias is not None)
        self.float_shape = layer.weight.shape
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride = layer.kernel_size, layer.stride
        self.padding, self.dilation = layer.padding, layer.dilation

    def forward(self, x: Tensor) -> Tensor:
        weight = self._buffers.get(FLOATS)
        if weight is not None:
            return _in_floats(F.conv2d, x, weight, self.bias, self.stride, self.padding, self.dilation)
        smoothing = None if self.smoothing is None else self.smoothing[:, None, None]
        # why_not_packable refuses paddings that are words.
        geometry = (self.kernel_size, self.stride, self.padding, self.dilation)
        return self.compute(_smoothed(x, smoothing), CONV2D, *geometry)  # type: ignore[arg-type]


class PackedEmbedding(PackedLayer):
    """Indices [...] to rows [..., size], in the dtype that the layer it stands for had."""

    def __init__(self, layer: nn.Embedding, edit: Pack) -> None:
        super().__init__(edit, None, layer.num_embeddings, layer.embedding_dim)
        self.num_embeddings, self.embedding_dim = layer.num_embeddings, layer.embedding_dim
        self.dtype = layer.weight.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # There is no input to see it by.
        self.dtype = cast_by(fn, self.dtype)
        return super()._apply(fn, recurse)

    def forward(self, indices: Tensor) -> Tensor:
        chosen = indices.flatten()
        codes = unpack_codes(self.weight.index_select(0, chosen), self.columns, self.edit.weight_bits)
        assert self.edit.group_size is not None
        values = dequantize_groups(codes, self.weight_scale.index_select(0, chosen), self.edit.group_size)
        return values.to(self.dtype).view(*indices.shape, self.columns)

    def in_floats(self) -> nn.Embedding:
        """A table that answers alike, and may grow."""
        rows = self._float_weight().to(self.dtype)
        return nn.Embedding.from_pretrained(rows)


def _in_floats(
    operation: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: object
) -> Tensor:
    """What `compute` answers but for the rounding of inputs, by an expanded `weight`; `x` is not smoothed."""
    if x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype):
        return operation(x, weight, bias, *geometry)
    wide = None if bias is None else bias.to(x.dtype).to(weight.dtype)
    return operation(x.to(weight.dtype), weight, wide, *geometry).to(x.dtype)


def _smoothed(x: Tensor, smoothing: Tensor | None) -> Tensor:
    return x if smoothing is None else (x * smoothing).to(x.dtype)


def why_not_packable(layer: nn.Module) -> str | None:
    """The reason why a layer cannot be packed in any format, or None where it can."""
    if isinstance(layer, nn.Conv2d):
        if layer.groups != 1:
            return f"grouped convolution ({layer.groups} groups)"
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return (
                f"convolution with padding {layer.padding_mode if layer.padding_mode != 'zeros' else layer.padding!r}"
            )
        return None
    if isinstance(layer, nn.Embedding):
        return None if layer.max_norm is None else f"embedding that rescales its rows (max_norm {layer.max_norm})"
    return None if isinstance(layer, nn.Linear) else f"{type(layer).__name__} is neither Linear, Conv2d nor Embedding"


def pack_layer(layer: nn.Module, edit: Pack, clock: StepClock | None) -> PackedLayer:
    """The empty packed form of `layer`; only weight-only does without a clock. Raises ValueError where it has none."""
    reason = why_not_packable(layer) or _why_not_so(layer, edit, clock)
    if reason is not None:
        raise ValueError(f"{edit.module} cannot be packed: {reason}")
    if isinstance(layer, nn.Linear):
        return PackedLinear(layer, edit, clock)
    if isinstance(layer, nn.Embedding):
        return PackedEmbedding(layer, edit)
    assert isinstance(layer, nn.Conv2d)
    return PackedConv2d(layer, edit, clock)


def float_form(layer: PackedLayer) -> nn.Module:
    """The layer that `layer` is the packed form of, with weights that it is born with."""
    has_bias = layer.bias is not None
    if isinstance(layer, PackedLinear):
        return nn.Linear(layer.in_features, layer.out_features, has_bias)
    if isinstance(layer, PackedEmbedding):
        return nn.Embedding(layer.num_embeddings, layer.embedding_dim)
    assert isinstance(layer, PackedConv2d)
    geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    return nn.Conv2d(layer.in_channels, layer.out_channels, *geometry, bias=has_bias)  # type: ignore[arg-type]


def _why_not_so(layer: nn.Module, edit: Pack, clock: StepClock | None) -> str | None:
    """The reason why a layer that can be packed cannot be in the format of `edit`."""
    if isinstance(layer, nn.Embedding) and (edit.activation_bits is not None or edit.smoothed):
        return f"an embedding has no input that {edit.words()} could round or smooth"
    if edit.activation_bits is not None and clock is None:
        return f"{edit.words()} has a scale for every step, and no clock tells the step"
    return None
