"""Units that nobody looks at: where what comes after them is inherited as a whole, as in DeepCache (2312.00858)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffpress.export.runtime import Inheritance, StepClock, StepPlan
from diffpress.export.runtime.inheritance import Frame
from diffpress.export.runtime.runs import Features
from diffpress.export.runtime.step_plan import INHERITED, UNUSED

from ..overlay import overlaid

OTHER = -3.0
"""What a feature is multiplied by to see whether anything changes: no unit, rounding or saturating, gives the same for it."""


@torch.no_grad()
def with_unused(plan: StepPlan, model: nn.Module, call: Callable[[], Tensor], timesteps: list[float]) -> StepPlan:
    """`plan` with those cells marked that no output of `call`, a call of `model`, depends on."""
    part = _Probe(plan, StepClock(timesteps))
    with overlaid(model, part.wraps(model), part.clock):
        part.computes = (True,) * len(plan.units)
        call()
        patterns = tuple(_marked(part, pattern, call) if INHERITED in pattern else pattern for pattern in plan.patterns)
    return plan.model_copy(update={"patterns": patterns})


def _marked(part: _Probe, pattern: str, call: Callable[[], Tensor]) -> str:
    part.computes = tuple(cell != INHERITED for cell in pattern)
    part.other = None
    known = call()
    found = list(pattern)
    for unit, cell in enumerate(pattern):
        part.other = unit
        if cell == INHERITED and torch.equal(call(), known):
            found[unit] = UNUSED
    return "".join(found)


class _Probe(Inheritance):
    """Inherits what its first call computed, of one unit something else."""

    computes: tuple[bool, ...]
    other: int | None = None
    features: dict[int, Features]

    def begin(self, call: object) -> None:  # type: ignore[override]
        """Every call is at the step of the first."""
        count, kept = len(self.computes), self.plan.kept
        past = [[] if computed else [self._past(unit)] * kept for unit, computed in enumerate(self.computes)]
        weights = torch.eye(1, kept).repeat(count, 1)
        self.frame = Frame(self.computes, (False,) * count, weights, past, None)

    def _past(self, unit: int) -> Features:
        factor = OTHER if unit == self.other else 1.0
        return tuple(feature * factor for feature in self.features[unit])

    def end(self, run: None) -> None:  # type: ignore[override]
        """Remember the first call."""
        frame, self.frame = self.frame, None
        if frame is not None and all(self.computes):
            self.features = frame.made
