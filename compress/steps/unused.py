"""What nobody looks at: where what comes after it is inherited as a whole, as in DeepCache (2312.00858)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffpress.export.runtime import Inheritance, StepClock, StepPlan
from diffpress.export.runtime.inheriting_calls import Frame
from diffpress.export.runtime.outlines import has_outline, outline
from diffpress.export.runtime.rows import looked_at
from diffpress.export.runtime.runs import Features
from diffpress.export.runtime.step_plan import COMPUTED, INHERITED, UNUSED

from ..overlay import overlaid
from .units import watching

OTHER = -3.0
"""What an output is multiplied by to see whether anything changes: nothing that rounds or saturates gives the same for it."""


@torch.no_grad()
def with_unused(plan: StepPlan, model: nn.Module, call: Callable[[], Tensor], timesteps: list[float]) -> StepPlan:
    """`plan` with those modules as skipped, and those cells marked, that nothing which is computed in `call` depends on.

    `call` is one of `model`. Beside its answer all features that later calls look at must stay as they are.
    """
    part = _Probe(plan, StepClock(timesteps))
    within = tuple(f"{name}." for unit in plan.units for name in unit.modules)
    names = {name for name, _ in model.named_modules() if name and not name.startswith(within)}
    with overlaid(model, part.wraps(model), part.clock), watching(model, names) as seen:
        call()
    part.outputs = {
        name: own.outputs[0] for name, own in seen.items() if len(own.outputs) == 1 and has_outline(own.outputs[0])
    }
    part.skippable = list(part.outputs)
    with overlaid(model, part.wraps(model), part.clock):
        while True:
            found = _as_wanted(part, plan, model, call)
            forecast = {unit for unit, looks in enumerate(looked_at(found)) if looks}
            if forecast <= part.wanted:
                return found
            part.wanted |= forecast


def _as_wanted(part: _Probe, plan: StepPlan, model: nn.Module, call: Callable[[], Tensor]) -> StepPlan:
    """`plan` where of what units compute later calls look at that of the `wanted` ones only."""
    skipped = tuple(_skipped(part, model, pattern, call) for pattern in plan.patterns)
    patterns = tuple(_marked(plan, *each) for each in zip(plan.patterns, skipped, strict=True))
    return plan.model_copy(update={"patterns": patterns, "skipped": skipped})


def _skipped(part: _Probe, model: nn.Module, pattern: str, call: Callable[[], Tensor]) -> tuple[str, ...]:
    """The outermost modules that can be left out all together."""
    if INHERITED not in pattern:
        return ()
    part.computes = tuple(cell == COMPUTED for cell in pattern)
    known = part.answer(call, {})
    found: dict[str, Any] = {}
    pending = [name for name, _ in model.named_children()]
    while pending:
        name = pending.pop()
        if name in part.outputs and part.stays(known, call, [*found, name]):
            found[name] = None
        elif name not in part.units:
            pending += [f"{name}.{child}" for child, _ in model.get_submodule(name).named_children()]
    return tuple(found)


def _marked(plan: StepPlan, pattern: str, skipped: tuple[str, ...]) -> str:
    """A unit is unused where it is skipped, or what it is in."""

    def within(name: str) -> bool:
        return any(name == other or name.startswith(f"{other}.") for other in skipped)

    unused = [all(map(within, unit.modules)) for unit in plan.units]
    return "".join(UNUSED if skips else cell for skips, cell in zip(unused, pattern, strict=True))


class _Probe(Inheritance):
    """Inherits what its first call computed, and leaves out what it is told to."""

    computes: tuple[bool, ...]
    features: dict[int, Features]
    outputs: Mapping[str, Any]
    """Of the first call, by module."""
    stand_ins: Mapping[str, Any]
    """Of modules that are left out."""

    def __init__(self, plan: StepPlan, clock: StepClock) -> None:
        super().__init__(plan, clock)
        self.computes = self.keeps = (True,) * len(plan.units)
        self.skippable, self.stand_ins, self.features = [], {}, {}
        self.wanted: set[int] = set()
        self.units = {name for unit in plan.units for name in unit.modules}

    def answer(self, call: Callable[[], Tensor], stand_ins: Mapping[str, Any]) -> tuple[Tensor, dict[int, Features]]:
        """Of a call, and the features that are wanted later."""
        self.stand_ins = stand_ins
        return call(), {unit: features for unit, features in self.left.items() if unit in self.wanted}

    def stays(self, known: tuple[Tensor, dict[int, Features]], call: Callable[[], Tensor], names: list[str]) -> bool:
        """Whether a call gives what is `known` whatever stands in for the modules of these `names`."""
        for change in (lambda output: _times(OTHER, output), outline):
            try:
                found = self.answer(call, {name: change(self.outputs[name]) for name in names})
            except RuntimeError:
                # Somebody writes into it.
                return False
            if not _same(found, known):
                return False
        return True

    def begin(self, call: object) -> None:  # type: ignore[override]
        """Every call is at the step of the first."""
        past = {} if all(self.computes) else {unit: [features] for unit, features in self.features.items()}
        weights = {unit: [torch.ones(())] for unit in past}
        known = {index: self.stand_ins[name] for index, name in enumerate(self.skippable) if name in self.stand_ins}
        skips = tuple(name in self.stand_ins for name in self.skippable)
        self.frame = Frame(self.computes, weights, past, skips=skips, known=known)

    def end(self, run: None) -> None:  # type: ignore[override]
        """Remember the first call."""
        frame, self.frame = self.frame, None
        self.left = frame.made
        self.features = self.features or frame.made


def _times(factor: float, output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(_times(factor, part) for part in output)
    return None if output is None else output * factor


def _same(found: tuple[Tensor, dict[int, Features]], known: tuple[Tensor, dict[int, Features]]) -> bool:
    (answer, left), (before, left_before) = found, known
    return (
        torch.equal(answer, before)
        and left.keys() == left_before.keys()
        and all(torch.equal(y, x) for unit in left for y, x in zip(left[unit], left_before[unit], strict=True))
    )
