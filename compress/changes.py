"""What a stage leaves behind: edits, their tensors, and what the plan and the report say of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from diffpress.export.edits import Edit, tensors_of
from diffpress.export.runtime import StepClock

from .overlay import overlaid, replaced


@dataclass(frozen=True)
class Note:
    """What the plan says of one module beside its bytes."""

    reason: str = ""
    """Why it was left alone or got another format than asked."""
    error: float | None = None
    """Relative squared error of the denoiser's output when only this module is changed."""
    format: str | None = None
    """Where neither an edit nor the stored dtype says it."""
    shape: tuple[int, ...] = ()
    """Of what has no weight, such as attention."""


@dataclass(frozen=True)
class Changes:
    """What became of one component, by one stage or by several."""

    edits: tuple[Edit, ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Of all edits, named `MODULE.TENSOR`."""
    notes: Mapping[str, Note] = field(default_factory=dict)
    """Per module."""
    history: tuple[dict[str, float], ...] = ()
    """How learning went: iteration, loss, evaluation."""
    settled: Mapping[str, Any] = field(default_factory=dict)
    """Options that the recipe left open, as the method chose them, such as `quantize.order`."""

    def then(self, later: Changes) -> Changes:
        """Both, one after the other; of a module that only the first has changed, what that says of it holds."""
        settled = {edit.module for edit in self.edits} - {edit.module for edit in later.edits}
        notes = {module: note for module, note in later.notes.items() if module not in settled & self.notes.keys()}
        return Changes(
            self.edits + later.edits,
            {**self.tensors, **later.tensors},
            {**self.notes, **notes},
            self.history + later.history,
            {**self.settled, **later.settled},
        )


@contextmanager
def worn(model: nn.Module, changes: Changes, timesteps: Sequence[float]) -> Iterator[None]:
    """`model` answers as it will with its `changes` while the context lasts; its own weights stay."""
    clock = StepClock(timesteps) if any(edit.per_step() for edit in changes.edits) else None
    with ExitStack() as stack:
        stack.enter_context(overlaid(model, {}, clock))
        for edit in changes.edits:
            tensors = tensors_of(edit, changes.tensors)
            stack.enter_context(replaced(model, edit.replaces(model, tensors)))
            stack.enter_context(overlaid(model, edit.wraps(model, tensors, clock)))
        yield
