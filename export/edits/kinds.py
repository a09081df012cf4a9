"""Every kind of edit, and what is done with a list of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated

from pydantic import Field

from .attach import Attach
from .attention import QuantizeAttention
from .base import Stored
from .factorize import Factorize
from .pack import Pack
from .resize import Resize

Edit = Annotated[Resize | Pack | QuantizeAttention | Factorize | Attach, Field(discriminator="kind")]
"""What a finished method leaves behind. A new kind is a new file here, and its name in this line."""


def edits_of(component: str, edits: Iterable[Edit]) -> list[Edit]:
    """The edits of one component, in their order."""
    return [edit for edit in edits if edit.component == component]


def tensors_of(edit: Edit, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Those of the edits' `tensors` that are this one's."""
    return {name: tensor for name, tensor in tensors.items() if edit.owns(name)}


def store_edits(
    tensors: Mapping[str, Stored], edits: Iterable[Edit], changed: Mapping[str, Stored]
) -> dict[str, Stored]:
    """What is stored of one component: its source's `tensors` after all its `edits`, whose own are `changed`; sorted."""
    for edit in edits:
        tensors = edit.store(tensors, tensors_of(edit, changed))
    return dict(sorted(tensors.items()))
