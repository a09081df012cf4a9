"""The options of each method: what a recipe may say about it. No torch here, so that a recipe is checked at once."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Bits = Literal[4, 8]


class Ptq(BaseModel):
    """Post-training quantization with scales searched on the recorded inputs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["ptq"] = Field(description="`ptq`: round to nearest, scales searched on what was recorded")
    weights: Bits = Field(default=8, description="bits of a weight; first, last and conditioning layers keep 8")
    activations: Bits = Field(
        default=8, description="bits of a layer's input; first, last and conditioning layers keep 8"
    )
    components: list[str] = Field(
        default=["denoiser"], min_length=1, description="what to quantize: ptq does the denoiser"
    )


METHODS: list[tuple[str, str, type[BaseModel]]] = [("quantize", "ptq", Ptq)]
"""Stage, name and options of every method."""
