"""One layer under training: Y = Q(X; s_x[step]) Q(W0 + BA; s_w), the sum merged before it is rounded."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffpress.export.runtime import Forward, StepClock
from diffpress.kernels import code_range, pack_codes, quantize, unpack_codes

from ..quantized_layer import QuantizedLayer, broadcast_scale, call_with, smoothed
from ..rounding import fake_quantize, straight_through_round, to_half

PART = 2**22
"""Entries of a weight that are worked on at a time where memory is short."""
CODE_OFFSET_BITS = 2
"""Of how far the code that a weight starts at lies from the nearest: -1, 0 or 1."""
ALL = slice(None)
"""Every row of a weight, which is every output."""


class QaloraLayer(nn.Module):
    """What is learned about one Linear or Conv2d, whose own tensors stay as they are; O outputs, K columns, S steps.

    Scales are kept as logarithms, so that one learning rate is a relative change for all of them. He et al. 2024,
    arXiv 2310.03270, eq. 6 (the layer) and eq. 9 (a scale a step).
    """

    weight_sign: Tensor
    lora_scale: Tensor
    smoothing: Tensor | None
    code_offset: Tensor | None
    code_offset_scale: Tensor | None

    def __init__(
        self,
        layer: nn.Module,
        start: QuantizedLayer,
        rank: int,
        lora_scale: float,
        per_step: bool,
        generator: torch.Generator,
    ) -> None:
        """Starts at `start`: B is zero, in units of `lora_scale`; without `per_step` steps share one scale."""
        super().__init__()
        self.format = start.format
        rows, columns = start.codes.flatten(1).shape
        rank = min(rank, rows, columns)
        device = start.codes.device
        self.a = nn.Parameter(torch.randn(rank, columns, generator=generator).to(device) / math.sqrt(rank))
        self.b = nn.Parameter(torch.zeros(rows, rank, device=device))
        self.log_weight_scale = nn.Parameter(start.weight_scale.abs().log())
        self.register_buffer("weight_sign", start.weight_scale.sign())
        self.register_buffer("lora_scale", torch.as_tensor(lora_scale, device=device))
        self.register_buffer("smoothing", start.smoothing)
        shift = _code_offset(self._smoothed_weight(layer), start)
        self.register_buffer("code_offset", None if shift is None else pack_codes(shift, CODE_OFFSET_BITS))
        self.register_buffer("code_offset_scale", None if shift is None else start.weight_scale)
        scale, zero_point = start.activation_scale, start.zero_point
        self.steps = 0 if scale is None else len(scale)
        entries = slice(None) if per_step else slice(1)
        self.log_activation_scale = None if scale is None else nn.Parameter(scale[entries].log())
        self.zero_point = None if zero_point is None else nn.Parameter(zero_point[entries].clone())
        bias = getattr(layer, "bias", None)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())

    def lora_delta(self, rows: slice = ALL) -> Tensor:
        """BA [O, K], or some rows of it."""
        return self.b[rows] * self.lora_scale @ self.a

    def merged(self, layer: nn.Module, rows: slice = ALL) -> Tensor:
        """W0 + BA, smoothed, in float32, or some rows of it; W0 is a whole code further where the start rounds it there."""
        weight = self._smoothed_weight(layer, rows)
        change = self.lora_delta(rows).view_as(weight)
        if self.code_offset is None or self.code_offset_scale is None:
            return weight + change
        codes = unpack_codes(self.code_offset[rows], change.flatten(1).shape[1], CODE_OFFSET_BITS).view_as(weight)
        return (
            weight.addcmul(codes, broadcast_scale(self.code_offset_scale[rows], weight.shape, self.format.group_size))
            + change
        )

    def _smoothed_weight(self, layer: nn.Module, rows: slice = ALL) -> Tensor:
        weight = layer.weight.detach()[rows].float()  # type: ignore[union-attr, operator]
        if self.smoothing is None:
            return weight
        return weight / self.smoothing.view(1, -1, *[1] * (weight.ndim - 2))

    def weight_scale(self) -> Tensor:
        """[O]"""
        return to_half(self.log_weight_scale.exp() * self.weight_sign)

    def forward(
        self, layer: nn.Module, x: Tensor, clock: StepClock, beneath: Forward | None = None, rows: slice = ALL
    ) -> Tensor:
        """What the quantized `layer` will answer to `x`, in float and with gradients; `rows`: some of its outputs only.

        `beneath` is the forward that this one is laid around; left out, the layer's own.
        """
        merged = self.merged(layer, rows)
        scale = broadcast_scale(self.weight_scale()[rows], merged.shape, self.format.group_size)
        weight = fake_quantize(merged, scale, None, self.format.weight_bits)
        rounded = self._round_input(smoothed(layer, x.float(), self.smoothing), clock)
        bias = None if self.bias is None else self.bias[rows]
        return call_with(layer, beneath or layer.forward, rounded, weight, bias).to(x.dtype)

    def forward_in_parts(self, layer: nn.Module, x: Tensor, clock: StepClock, beneath: Forward | None = None) -> Tensor:
        """The same, keeping `x` alone for the way back, and with few rows of a large weight in memory at a time."""
        weight = layer.weight
        assert isinstance(weight, Tensor)
        count = math.ceil(len(weight) * PART / max(weight.numel(), PART))
        parts = [
            checkpoint(self.forward, layer, x, clock, beneath, slice(start, start + count), use_reentrant=False)
            for start in range(0, len(weight), count)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1 if isinstance(layer, nn.Conv2d) else -1)

    def activation_tables(self) -> tuple[Tensor | None, Tensor | None]:
        """Scale and zero point of the input at every step [S]; None where there is none."""
        if self.log_activation_scale is None:
            return None, None
        scale = self.log_activation_scale.exp().expand(self.steps)
        if self.zero_point is None:
            return scale, None
        assert self.format.activation_bits is not None
        return scale, self.zero_point.clamp(*code_range(self.format.activation_bits)).expand(self.steps)

    def _round_input(self, x: Tensor, clock: StepClock) -> Tensor:
        scales, zero_points = self.activation_tables()
        if scales is None:
            return x
        assert self.format.activation_bits is not None
        scale = along_batch(clock.select(scales), x)
        zero_point = None
        if zero_points is not None:
            zero_point = straight_through_round(along_batch(clock.select(zero_points), x))
        return fake_quantize(x, scale, zero_point, self.format.activation_bits)

    @torch.no_grad()
    def finish(self, layer: nn.Module) -> QuantizedLayer:
        """The integers that were trained."""
        merged = self.merged(layer)
        weight_scale = self.weight_scale()
        codes = quantize(
            merged, broadcast_scale(weight_scale, merged.shape, self.format.group_size), self.format.weight_bits
        )
        scale, zero_point = self.activation_tables()
        return QuantizedLayer(
            self.format,
            codes,
            weight_scale,
            scale,
            None if zero_point is None else zero_point.round(),
            self.smoothing,
            None if self.bias is None else self.bias.detach().clone(),
        )


def _code_offset(weight: Tensor, start: QuantizedLayer) -> Tensor | None:
    """How many codes [O, K] the start lies from the nearest, by one at most; None where it does nowhere.

    Shifted by a whole code a weight keeps its place between two of them, so that learning moves it as easily as others.
    """
    nearest = weight.div(broadcast_scale(start.weight_scale, weight.shape, start.format.group_size)).round_()
    # In place, since a weight may be large.
    away = nearest.clamp_(*code_range(start.format.weight_bits)).sub_(start.codes)
    shift = away.neg_().clamp_(-1, 1).flatten(1).to(torch.int8)
    return shift if bool(shift.any()) else None


def along_batch(values: Tensor, x: Tensor) -> Tensor:
    """One value for all, or one an entry of the batch, against `x`.

    Where a model folds something into its batch (frames, windows), the entries of one image lie beside each other.
    """
    return values.repeat_interleave(x.shape[0] // len(values)).view(-1, *[1] * (x.ndim - 1))
