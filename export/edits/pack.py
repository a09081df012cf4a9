"""Weights in few bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from ..runtime import StepClock, Wrap, pack_layer
from ..ties import share_, ties
from .base import EditBase, Stored


class Pack(EditBase):
    """The weight of one Linear, Conv2d or Embedding is stored in few bits, and the input of the first two may be rounded.

    Its tensors are `weight` (see `kernels.pack_codes`; float8 stays [out, in]), `weight_scale` [out] or, weight-only,
    [out, groups], `activation_scale` [steps] where the input is rounded, and `zero_point`, `smoothing` and `bias` where
    there are some. Scales of weights may be stored in float16; a layer computes with them in float32.
    """

    kind: Literal["pack"] = "pack"
    weight_bits: Literal[2, 3, 4, 8]
    activation_bits: Literal[4, 6, 8] | None
    """None is weight-only: the input is left as it is."""
    group_size: int | None = Field(None, ge=1)
    """Weight-only: neighbouring columns of the weight that share a scale."""
    float8: bool = False
    """Weights and inputs are float8_e4m3fn instead of integers."""
    asymmetric: bool = False
    """0 has a code of its own at each step: `zero_point` [steps], float32."""
    smoothed: bool = False
    """The input is multiplied by `smoothing` [in channels], by which the weight was divided."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.activation_bits is None) != (self.group_size is not None):
            raise ValueError("weight-only (activation_bits None) needs a group_size, and nothing else takes one")
        if self.float8 and (self.weight_bits, self.activation_bits) != (8, 8):
            raise ValueError("float8 has 8 bits for weights and 8 for activations")
        if self.asymmetric and (self.float8 or self.activation_bits is None):
            raise ValueError("asymmetric needs activations that are rounded to integers")
        return self

    def words(self) -> str:
        """Such as `W4A8`, `W4 g64` or `FP8`."""
        if self.float8:
            return "FP8"
        activations = f" g{self.group_size}" if self.activation_bits is None else f"A{self.activation_bits}"
        return f"W{self.weight_bits}{activations}"

    def per_step(self) -> bool:
        return self.activation_bits is not None

    def apply_(self, model: nn.Module, clock: StepClock | None) -> None:
        """Replace one module, and let those that are tied to it share what takes its place."""
        weight = f"{self.module}.weight"
        if weight in ties(model):
            raise ValueError(f"it shares {ties(model)[weight]}; edit that module")
        packed = pack_layer(model.get_submodule(self.module), self, clock if self.per_step() else None)
        share_(model, self.module, packed)
        model.set_submodule(self.module, packed)

    def wraps(self, model: nn.Module, tensors: Mapping[str, Tensor], clock: StepClock | None) -> Mapping[str, Wrap]:
        module = model.get_submodule(self.module)
        packed = pack_layer(module, self, clock if self.per_step() else None)
        held = module.state_dict() | {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
        packed.load_state_dict({name: held[name] for name in packed.state_dict()})
        packed.to(next(module.parameters()).device)
        return {self.module: lambda _forward: packed.forward}

    def store(self, source: Mapping[str, Stored], tensors: Mapping[str, Stored]) -> dict[str, Stored]:
        return {name: tensor for name, tensor in source.items() if name != f"{self.module}.weight"} | dict(tensors)

    def exact(self) -> frozenset[str]:
        """All but the bias."""
        names = {
            "weight": True,
            "weight_scale": True,
            "activation_scale": self.per_step(),
            "zero_point": self.asymmetric,
            "smoothing": self.smoothed,
        }
        return frozenset(f"{self.module}.{name}" for name, stored in names.items() if stored)
