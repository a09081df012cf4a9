"""Edits onto a model that has no weights yet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from .edits import Edit
from .errors import ArtifactError
from .runtime import StepClock, attach_clock_


def needs_clock(edits: Iterable[Edit]) -> bool:
    """Whether any of the edits has to know the current step."""
    return any(edit.per_step() for edit in edits)


def apply_edits_(model: nn.Module, edits: Sequence[Edit], timesteps: Sequence[float]) -> StepClock | None:
    """Replace or change the edited modules of `model` in place; returns the clock that follows its calls, where one must.

    `timesteps` are not looked at where none does. Raises ArtifactError where an edit does not fit the model.
    """
    clock = _clock(timesteps) if needs_clock(edits) else None
    for edit in edits:
        try:
            edit.apply_(model, clock)
        except (AttributeError, ValueError) as error:
            raise ArtifactError(f"edit of {edit.component}.{edit.module} does not apply: {error}") from error
    if clock is not None:
        attach_clock_(model, clock)
    return clock


def _clock(timesteps: Sequence[float]) -> StepClock:
    try:
        return StepClock(timesteps)
    except ValueError as error:
        raise ArtifactError(f"the edits do not apply: {error}") from error
