"""A runtime part beside the model's own modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from ..runtime import Inheritance, StepClock, StepPlan, Wrap
from .base import EditBase


class Attach(EditBase):
    """A part is added to the model as `module`, and laid around modules that were there before; it stores what it holds.

    The part of a step plan holds `damping` [steps, units, order] and, where forecasts are corrected, `correction`
    [inheriting steps, 2, channels].
    """

    kind: Literal["attach"] = "attach"
    settings: StepPlan
    """Which part it is, and how it is made."""

    def words(self) -> str:
        return f"step plan, {len(self.settings.patterns)} patterns of {len(self.settings.units)} units"

    def per_step(self) -> bool:
        return True

    def apply_(self, model: nn.Module, clock: StepClock | None) -> None:
        parent, _dot, name = self.module.rpartition(".")
        part = self._part(clock)
        wraps = part.wraps(model)
        model.get_submodule(parent).add_module(name, part)
        for place, wrap in wraps.items():
            module = model.get_submodule(place)
            module.forward = wrap(module.forward)

    def wraps(self, model: nn.Module, own: Mapping[str, Tensor], clock: StepClock | None) -> Mapping[str, Wrap]:
        part = self._part(clock)
        part.load_state_dict({name.rpartition(".")[2]: tensor for name, tensor in own.items()})
        return part.wraps(model)

    def why_not_exported(self) -> str:
        return "graphs keep nothing from one step to the next"

    def exact(self) -> frozenset[str]:
        """All that it holds."""
        names = ("damping", "correction") if self.settings.corrected else ("damping",)
        return frozenset(f"{self.module}.{name}" for name in names)

    def _part(self, clock: StepClock | None) -> Inheritance:
        assert clock is not None
        return Inheritance(self.settings, clock)
