"""Attention on integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from ..runtime import AttentionOverride, Int8Attention, StepClock, Wrap, quantize_attention_
from .base import EditBase


class QuantizeAttention(EditBase):
    """The attention of one module is computed on integers (see `kernels.int8_attention`); it stores no tensors.

    `module` is one with an attention processor.
    """

    kind: Literal["quantize_attention"] = "quantize_attention"
    integer_values: bool = False
    """The product of softmax and values is one of integers too, not that of queries and keys alone."""

    def words(self) -> str:
        return "attention int8" if self.integer_values else "attention Q·K int8"

    def apply_(self, model: nn.Module, clock: StepClock | None) -> None:
        quantize_attention_(model.get_submodule(self.module), self.integer_values)

    def wraps(self, model: nn.Module, tensors: Mapping[str, Tensor], clock: StepClock | None) -> Mapping[str, Wrap]:
        return {self.module: lambda forward: AttentionOverride(forward, Int8Attention(self.integer_values))}
