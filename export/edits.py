"""What a finished method leaves behind: plain frozen data that saving, loading, the report and export understand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Pack(BaseModel):
    """The weight of one Linear, Conv2d or Embedding is stored in few bits, and the input of the first two may be rounded.

    Its tensors are `weight` (see `kernels.pack_codes`; float8 stays [out, in]), `weight_scale` [out] or, weight-only,
    [out, groups], `activation_scale` [steps] where the input is rounded, and `zero_point`, `smoothing` and `bias` where
    there are some.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["pack"] = "pack"
    component: str
    """Folder of the pipeline component, such as `unet`."""
    module: str
    """Dotted path inside the component."""
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

    @property
    def format(self) -> str:
        """The word for reports: such as `W4A8`, `W4 g64` or `FP8`."""
        if self.float8:
            return "FP8"
        activations = f" g{self.group_size}" if self.activation_bits is None else f"A{self.activation_bits}"
        return f"W{self.weight_bits}{activations}"


class QuantizeAttention(BaseModel):
    """The attention of one module is computed on integers (see `kernels.int8_attention`); it stores no tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["quantize_attention"] = "quantize_attention"
    component: str
    """Folder of the pipeline component, such as `unet`."""
    module: str
    """Dotted path inside the component of a module with an attention processor."""
    integer_values: bool = False
    """The product of softmax and values is one of integers too, not that of queries and keys alone."""

    @property
    def format(self) -> str:
        """The word for reports."""
        return "attention int8" if self.integer_values else "attention Q·K int8"


Edit = Annotated[Pack | QuantizeAttention, Field(discriminator="kind")]
"""Every kind of edit."""


def edits_of(component: str, edits: Iterable[Edit]) -> list[Edit]:
    """The edits of one component, in their order."""
    return [edit for edit in edits if edit.component == component]
