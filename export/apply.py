"""Edits onto a model that has no weights yet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from .edits import Edit
from .errors import ArtifactError
from .runtime import StepClock, attach_clock_, pack_layer


def apply_edits_(model: nn.Module, edits: Iterable[Edit], timesteps: Sequence[float]) -> StepClock:
    """Replace the edited modules of `model` in place and let one clock follow its calls; returns that clock.

    Raises ArtifactError where an edit names a module the model has not, or one that cannot be packed.
    """
    try:
        clock = StepClock(timesteps)
    except ValueError as error:
        raise ArtifactError(f"the edits do not apply: {error}") from error
    for edit in edits:
        path, _, name = edit.module.rpartition(".")
        try:
            parent = model.get_submodule(path)
            setattr(parent, name, pack_layer(parent.get_submodule(name), edit, clock))
        except (AttributeError, ValueError) as error:
            raise ArtifactError(f"edit of {edit.component}.{edit.module} does not apply: {error}") from error
    attach_clock_(model, clock)
    return clock
