"""How edits ride in a component's config.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from ..apply import needs_clock
from ..edits import Edit
from .method import Method


class EditsConfig(BaseModel):
    """The `quantization_config` of an edited component, with the methods that diffusers and transformers call."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    quant_method: Method = Method.DIFFPRESS
    timesteps: list[float]
    """Empty where no edit rounds activations."""
    edits: list[Edit]

    @classmethod
    def of(cls, edits: Sequence[Edit], timesteps: list[float]) -> Self:
        """What a component with these edits stores, in a pipeline of these time steps."""
        return cls(timesteps=timesteps if needs_clock(edits) else [], edits=list(edits))

    @classmethod
    def from_dict(cls, data: dict[str, Any], **_: Any) -> Self:
        return cls.model_validate(data)

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")
