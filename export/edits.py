"""What a finished method leaves behind: plain frozen data that saving, loading, the report and export understand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict


class Pack(BaseModel):
    """The weight of one Linear or Conv2d is stored as integers, and its input is rounded to integers.

    Its tensors are `weight` (see `kernels.pack_int4` at 4 bits), `weight_scale` [out], `activation_scale` [steps] and,
    where the layer had one, `bias`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["pack"] = "pack"
    component: str
    """Folder of the pipeline component, such as `unet`."""
    module: str
    """Dotted path inside the component."""
    weight_bits: Literal[4, 8]
    activation_bits: Literal[4, 8]


Edit = Pack
"""Every kind of edit."""


def edits_of(component: str, edits: Iterable[Edit]) -> list[Edit]:
    """The edits of one component, in their order."""
    return [edit for edit in edits if edit.component == component]
