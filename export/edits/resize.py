"""Fewer rows and columns."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..runtime import StepClock
from ..ties import ties
from .base import EditBase, Replacement, Stored

Run = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]]
"""Neighbouring places: the first, and how many."""
ATTRIBUTES: Mapping[type[nn.Module], tuple[str | None, str | None]] = {
    nn.Linear: ("out_features", "in_features"),
    nn.Conv2d: ("out_channels", "in_channels"),
    nn.GroupNorm: ("num_channels", None),
}
"""What modules call how many outputs and inputs they have."""
OUTPUTS, INPUTS = 0, 1
"""Dimensions of a weight."""
REFITTED = "refitted"
"""What new values are kept under beside the tensors of edits that come later; they are stored under the model's names."""


class Resize(EditBase):
    """A module keeps some of its outputs (rows of a weight) and inputs (columns), and its attributes change with them.

    Where it is `refitted` its tensors are the `weight`, and the `bias` where there is one, that what is kept has now.
    """

    kind: Literal["resize"] = "resize"
    outputs: tuple[Run, ...] | None = None
    """Kept, in their order; None is all of them."""
    inputs: tuple[Run, ...] | None = None
    attributes: dict[str, int] = Field(default={})
    """Of the module, such as how many heads it has now."""
    refitted: bool = False

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        for kept in (self.outputs, self.inputs):
            if kept is not None and (not kept or any(a + n >= b for (a, n), (b, _) in pairwise(kept))):
                raise ValueError("what is kept must be runs in rising order with gaps between them, one at least")
        return self

    def words(self) -> str:
        return ""

    def left(self, shape: tuple[int, ...]) -> str:
        sides = zip((self.outputs, self.inputs), shape, ("outputs", "inputs"), strict=False)
        parts = [f"{count_of(kept)} of {size} {name}" for kept, size, name in sides if kept is not None]
        return ", ".join(parts) + (", refitted" if self.refitted else "")

    def apply_(self, model: nn.Module, clock: StepClock | None) -> None:
        for owner, name, value in self.replaces(model, {}):
            setattr(owner, name, value)

    def replaces(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterable[Replacement]:
        module = model.get_submodule(self.module)
        if self.outputs is None and self.inputs is None:
            return [Replacement(module, name, value) for name, value in self._checked(module).items()]
        if f"{self.module}.weight" in {*ties(model), *ties(model).values()}:
            raise ValueError("its weight stands for another one as well")
        new = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
        parent, _dot, name = self.module.rpartition(".")
        return [Replacement(model.get_submodule(parent), name, self._resized(module, new))]

    def owns(self, tensor: str) -> bool:
        return tensor.rpartition(".")[0] == f"{self.module}.{REFITTED}"

    def store(self, source: Mapping[str, Stored], tensors: Mapping[str, Stored]) -> dict[str, Stored]:
        stored = dict(source)
        for name in ("weight", "bias"):
            path = f"{self.module}.{name}"
            if path in stored:
                stored[path] = tensors.get(f"{self.module}.{REFITTED}.{name}", self._cut(name, stored[path]))
        return stored

    def _checked(self, module: nn.Module) -> dict[str, int]:
        for name in self.attributes:
            if not isinstance(getattr(module, name, None), int):
                raise ValueError(f"{type(module).__name__} has no number {name!r}")
        return self.attributes

    def _resized(self, module: nn.Module, new: Mapping[str, Tensor]) -> nn.Module:
        """A module like this one, smaller, with the `new` tensors instead of its own."""
        names = next((names for kind, names in ATTRIBUTES.items() if isinstance(module, kind)), None)
        if names is None:
            raise ValueError(f"{type(module).__name__} is of no kind that can be resized")
        if self.inputs is not None and names[INPUTS] is None:
            raise ValueError(f"{type(module).__name__} has no inputs apart from its outputs")
        small = copy.copy(module)
        small.__dict__["_parameters"] = {
            name: None if own is None else _like(own, new.get(name, self._cut(name, own.detach())))
            for name, own in module._parameters.items()
        }
        for kept, name in zip((self.outputs, self.inputs), names, strict=True):
            if kept is not None and name is not None:
                setattr(small, name, count_of(kept))
        for name, value in self._checked(module).items():
            setattr(small, name, value)
        return small

    def _cut(self, name: str, stored: Any) -> Any:
        """What is kept of a `weight` or a `bias`: of a tensor, or of its form."""
        kept = {OUTPUTS: self.outputs} if name == "bias" else {OUTPUTS: self.outputs, INPUTS: self.inputs}
        for dimension, runs in kept.items():
            if runs is not None:
                stored = _taken(stored, dimension, runs)
        return stored


def runs_of(places: Iterable[int]) -> tuple[Run, ...]:
    """Rising `places` as runs of neighbours."""
    runs: list[tuple[int, int]] = []
    for place in places:
        if runs and place == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((place, 1))
    return tuple(runs)


def count_of(runs: Iterable[Run]) -> int:
    """How many places there are."""
    return sum(count for _, count in runs)


def _taken(stored: Any, dimension: int, runs: tuple[Run, ...]) -> Any:
    size = stored.shape[dimension]
    if sum(runs[-1]) > size:
        raise ValueError(f"it keeps place {sum(runs[-1]) - 1} of {size}")
    if isinstance(stored, Tensor) and not stored.is_meta:
        return torch.cat([stored.narrow(dimension, *run) for run in runs], dimension)
    shape = (*stored.shape[:dimension], count_of(runs), *stored.shape[dimension + 1 :])
    return stored.new_empty(shape) if isinstance(stored, Tensor) else stored._replace(shape=shape)


def _like(own: nn.Parameter, values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(own.device, own.dtype), own.requires_grad)
