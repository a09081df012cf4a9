"""Weights of low rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from ..runtime import StepClock, Wrap, factorize_layer
from .base import EditBase, Stored


class Factorize(EditBase):
    """One Linear becomes two: `MODULE.down` [rank, in] has no bias, `MODULE.up` [out, rank] has one.

    Its tensors are `down.weight`, `up.weight` and `up.bias`. They may be stored in fewer bits; the two compute in float32.
    Each is a Linear that later edits may name.
    """

    kind: Literal["factorize"] = "factorize"
    rank: int = Field(ge=1)

    def words(self) -> str:
        return f"rank {self.rank}"

    def apply_(self, model: nn.Module, clock: StepClock | None) -> None:
        model.set_submodule(self.module, factorize_layer(model.get_submodule(self.module), self.rank))

    def wraps(self, model: nn.Module, tensors: Mapping[str, Tensor], clock: StepClock | None) -> Mapping[str, Wrap]:
        module = model.get_submodule(self.module)
        factors = factorize_layer(module, self.rank)
        factors.load_state_dict({name.removeprefix(f"{self.module}."): tensor for name, tensor in tensors.items()})
        factors.to(next(module.parameters()).device)
        return {self.module: lambda _forward: factors.forward}

    def owns(self, tensor: str) -> bool:
        return tensor in self.exact()

    def store(self, source: Mapping[str, Stored], tensors: Mapping[str, Stored]) -> dict[str, Stored]:
        replaced = (f"{self.module}.weight", f"{self.module}.bias")
        return {name: tensor for name, tensor in source.items() if name not in replaced} | dict(tensors)

    def exact(self) -> frozenset[str]:
        return frozenset(f"{self.module}.{name}" for name in ("down.weight", "up.weight", "up.bias"))
