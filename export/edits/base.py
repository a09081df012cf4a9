"""What every kind of edit can be asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ..runtime import StepClock, Wrap

Stored = TypeVar("Stored")
"""A tensor, or its form alone."""


class Replacement(NamedTuple):
    """What an attribute of a module becomes: a number, or, where it is the name of a child, another module."""

    owner: nn.Module
    name: str
    value: Any


class EditBase(BaseModel):
    """One change of one module, as plain frozen data; saving, loading, the report and the exporters know no more of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    component: str
    """Folder of the pipeline component, such as `unet`."""
    module: str
    """Dotted path inside the component."""

    def words(self) -> str:
        """What the report calls what it makes of a module; empty where that is as it was, but for its size."""
        raise NotImplementedError

    def left(self, shape: tuple[int, ...]) -> str:
        """What is left of a weight of that shape, in words; empty where all is."""
        return ""

    def per_step(self) -> bool:
        """Whether it has to know the current sampling step."""
        return False

    def apply_(self, model: nn.Module, clock: StepClock | None) -> None:
        """Change the empty `model` in place, in the order of the edits; `clock` tells the step to those that are `per_step`.

        Raises ValueError or AttributeError where it does not fit.
        """
        raise NotImplementedError

    def wraps(self, model: nn.Module, tensors: Mapping[str, Tensor], clock: StepClock | None) -> Mapping[str, Wrap]:
        """The same on a `model` that has its weights and keeps them: what is laid around the forwards of modules, by their
        names, with the edit's tensors.
        """
        return {}

    def replaces(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterable[Replacement]:
        """And what takes the place of modules and their attributes; later edits, and later stages, are of that."""
        return ()

    def owns(self, tensor: str) -> bool:
        """Whether a tensor of this name is the edit's own, as `MODULE.TENSOR` is."""
        return tensor.rpartition(".")[0] == self.module

    def store(self, source: Mapping[str, Stored], tensors: Mapping[str, Stored]) -> dict[str, Stored]:
        """What is stored of a component's `source` tensors once the edit is made, which has the `tensors`."""
        return {**source, **tensors}

    def why_not_exported(self) -> str | None:
        """Why an export cannot hold it yet; None where it can."""
        return None

    def exact(self) -> frozenset[str]:
        """Tensors whose dtype no loader may change."""
        return frozenset()
