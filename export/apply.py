"""Edits onto a model that has no weights yet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from .edits import Edit, Pack, QuantizeAttention
from .errors import ArtifactError
from .runtime import StepClock, attach_clock_, pack_layer, quantize_attention_


class Shared(nn.Module):
    """Stands where another module holds the weight: without tensors of its own, so that they are stored once."""

    def __init__(self, holder: nn.Module) -> None:
        super().__init__()
        # In a tuple, where torch does not take it for a child.
        self._holder = (holder,)

    def forward(self, *arguments: Any) -> Any:
        return self._holder[0](*arguments)


def needs_clock(edits: Iterable[Edit]) -> bool:
    """Whether any of the edits has a table with an entry a step."""
    return any(_has_tables(edit) for edit in edits)


def apply_edits_(model: nn.Module, edits: Sequence[Edit], timesteps: Sequence[float]) -> StepClock | None:
    """Replace or change the edited modules of `model` in place; returns the clock that follows its calls, where one must.

    `timesteps` are not looked at where none does. Raises ArtifactError where an edit names a module the model has not,
    or one that cannot be packed or has no attention.
    """
    clock = _clock(timesteps) if needs_clock(edits) else None
    for edit in edits:
        try:
            if isinstance(edit, QuantizeAttention):
                quantize_attention_(model.get_submodule(edit.module), edit)
            else:
                _pack_(model, edit, clock if _has_tables(edit) else None)
        except (AttributeError, ValueError) as error:
            raise ArtifactError(f"edit of {edit.component}.{edit.module} does not apply: {error}") from error
    if clock is not None:
        attach_clock_(model, clock)
    return clock


def ties(model: nn.Module) -> dict[str, str]:
    """Names of tensors to the names of those that stand for them: transformers ties weights, diffusers does not."""
    return getattr(model, "all_tied_weights_keys", {})


def _has_tables(edit: Edit) -> bool:
    return isinstance(edit, Pack) and edit.activation_bits is not None


def _clock(timesteps: Sequence[float]) -> StepClock:
    try:
        return StepClock(timesteps)
    except ValueError as error:
        raise ArtifactError(f"the edits do not apply: {error}") from error


def _pack_(model: nn.Module, edit: Pack, clock: StepClock | None) -> None:
    """Replace one module, and let those that are tied to it share what takes its place."""
    weight = f"{edit.module}.weight"
    if weight in ties(model):
        raise ValueError(f"it shares {ties(model)[weight]}; edit that module")
    packed = pack_layer(model.get_submodule(edit.module), edit, clock)
    for name in [alias for alias, source in ties(model).items() if source == weight]:
        model.set_submodule(name.removesuffix(".weight"), Shared(packed))
        # Transformers looks the names up, and would miss the tensor.
        del ties(model)[name]
    model.set_submodule(edit.module, packed)
