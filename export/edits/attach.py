"""A runtime part beside the model's own modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from ..runtime import Feedback, FeedbackPlan, Inheritance, RuntimePart, StepClock, StepPlan, Wrap
from .base import EditBase

PARTS: Mapping[type, type[RuntimePart]] = {StepPlan: Inheritance, FeedbackPlan: Feedback}
"""What is made of which settings."""


class Attach(EditBase):
    """A part is added to the model as `module`, and laid around modules that were there before; it stores what it holds.

    That of a step plan holds `damping` [steps, units, order] and, where forecasts are corrected, `correction`
    [inheriting steps, 2, channels]; that of a feedback plan `scales` [looped blocks], `damping` [steps] and the weights of
    `block`.
    """

    kind: Literal["attach"] = "attach"
    settings: StepPlan | FeedbackPlan = Field(discriminator="part")
    """Which part it is, and how it is made."""

    def words(self) -> str:
        return self.settings.words()

    def per_step(self) -> bool:
        return True

    def apply_(self, model: nn.Module, clock: StepClock | None) -> None:
        parent, _dot, name = self.module.rpartition(".")
        part = self._part(model, clock)
        wraps = part.wraps(model)
        model.get_submodule(parent).add_module(name, part)
        for place, wrap in wraps.items():
            module = model.get_submodule(place)
            module.forward = wrap(module.forward)

    def wraps(self, model: nn.Module, tensors: Mapping[str, Tensor], clock: StepClock | None) -> Mapping[str, Wrap]:
        part = self._part(model, clock)
        part.load_state_dict({name.removeprefix(f"{self.module}."): tensor for name, tensor in tensors.items()})
        return part.wraps(model)

    def owns(self, tensor: str) -> bool:
        return tensor.startswith(f"{self.module}.")

    def why_not_exported(self) -> str | None:
        return self.settings.why_not_exported()

    def exact(self) -> frozenset[str]:
        """Tables over steps, and scales."""
        return frozenset(f"{self.module}.{name}" for name in self.settings.exact())

    def _part(self, model: nn.Module, clock: StepClock | None) -> RuntimePart:
        assert clock is not None
        return PARTS[type(self.settings)].around(self.settings, model, clock)


def step_plans(edits: Iterable[EditBase]) -> list[StepPlan]:
    """What steps inherit by."""
    attached = [edit.settings for edit in edits if isinstance(edit, Attach)]
    return [settings for settings in attached if isinstance(settings, StepPlan)]
