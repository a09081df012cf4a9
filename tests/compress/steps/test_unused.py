"""What nobody looks at is left out, and that nothing changes by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffpress.calibration.sampling import replay
from diffpress.compress.overlay import overlaid
from diffpress.compress.steps.units import find_units
from diffpress.compress.steps.unused import with_unused
from diffpress.export.runtime import Inheritance, StepClock, StepPlan

STEPS = [900.0, 700.0, 500.0, 300.0, 100.0]


@dataclass
class Planned:
    """The denoiser of a text pipeline, and a plan for it before and after it is known what nobody looks at."""

    model: nn.Module
    inputs: dict[str, Tensor]
    plan: StepPlan
    shorter: StepPlan
    call: Callable[[], Any]

    def answers(self, plan: StepPlan) -> list[Tensor]:
        """Of one call a step, for a sample that moves."""
        with inheriting(self.model, plan):
            return [self.asked(step) for step in range(len(STEPS))]

    @torch.no_grad()
    def asked(self, step: int) -> Tensor:
        inputs = {**self.inputs, "timestep": torch.tensor(STEPS[step])}
        inputs["sample"] = inputs["sample"] * (1 + 0.1 * step)
        answer: Tensor = self.model(**inputs, return_dict=False)[0]
        return answer


@contextmanager
def inheriting(model: nn.Module, plan: StepPlan) -> Iterator[Inheritance]:
    clock = StepClock(STEPS)
    part = Inheritance(plan, clock)
    part.damping.fill_(0.7)
    with overlaid(model, part.wraps(model), clock):
        yield part


@pytest.fixture(scope="module")
def planned(recorded: Callable[[str], Any]) -> Planned:
    """What comes before its upsampler is computed at step 2, when no answer needs it; the rest at step 3, from its features."""
    own = recorded("tiny_text")
    calls = list(own.trajectories.calls(own.trajectories.shards[:1]))
    ask = [lambda call=call: replay(own.denoiser, call) for call in calls[:2]]
    units, _ = find_units(own.denoiser, ask, 2, "stack")
    cells = np.zeros((len(STEPS), len(units)), dtype=bool)
    cells[[0, 4]] = True
    (upsampler,) = (index for index, unit in enumerate(units) if "upsampler" in unit.modules[0])
    cells[2, :upsampler] = True
    cells[3, upsampler:] = True
    plan = StepPlan.of(units, cells, order=1)
    inputs = {name: x for name, x in calls[0].inputs.items() if name != "timestep"}
    return Planned(own.denoiser, inputs, plan, with_unused(plan, own.denoiser, ask[1], STEPS), ask[1])


def test_every_answer_stays_what_it_was(planned: Planned) -> None:
    assert planned.shorter.patterns != planned.plan.patterns
    for own, other in zip(planned.answers(planned.shorter), planned.answers(planned.plan), strict=True):
        assert torch.equal(own, other)


def test_blocks_and_embeddings_that_only_unused_units_read_are_not_called(planned: Planned) -> None:
    pattern = planned.shorter.steps[1]
    skipped = planned.shorter.skipped[pattern]
    assert {"mid_block", "time_proj", "time_embedding"} <= set(skipped)
    assert "-" in planned.shorter.patterns[pattern]
    with inheriting(planned.model, planned.shorter):
        planned.asked(0)
        names = [name for name, _ in planned.model.named_modules() if name.startswith(skipped)]
        handles = [planned.model.get_submodule(name).register_forward_hook(refuse) for name in below(skipped, names)]
        planned.asked(1)
        for handle in handles:
            handle.remove()


def refuse(module: nn.Module, *_: Any) -> None:
    pytest.fail(f"{type(module).__name__} was called")


def below(skipped: tuple[str, ...], names: list[str]) -> list[str]:
    """What is inside: a module that is skipped is called, and answers by itself."""
    return [name for name in names if any(name.startswith(f"{other}.") for other in skipped)]


def test_what_a_later_step_wants_is_computed_though_no_answer_needs_it(planned: Planned) -> None:
    first, later = (planned.shorter.patterns[planned.shorter.steps[step]] for step in (2, 3))
    last = later.rindex(".")
    assert first[last] == "#"
    assert without_a_later_step(planned).patterns[2][last] == "-"


def without_a_later_step(planned: Planned) -> StepPlan:
    """That would look at what step 2 computes."""
    alone = planned.plan.model_copy(update={"patterns": planned.plan.patterns[:3], "steps": (0, 1, 2, 1, 0)})
    return with_unused(alone, planned.model, planned.call, STEPS)


def test_features_that_no_step_looks_at_are_not_kept(planned: Planned) -> None:
    plan = without_a_later_step(planned)
    with inheriting(planned.model, plan) as part:
        planned.asked(0)
        (run,) = part.runs.live
        looked_at = [any(row[unit] == "." for row in plan.patterns) for unit in range(len(plan.units))]
        assert 0 < sum(looked_at) < len(looked_at)
        assert set(run.past) == {unit for unit, looks in enumerate(looked_at) if looks}


def test_a_row_that_the_plan_has_not_computes_what_left_nothing(planned: Planned) -> None:
    """As with fewer steps, where a call stands for several rows."""
    cells = np.array([[True, True, True], [False, True, False], [True, False, False], [True, True, True]])
    plan = StepPlan.of(planned.plan.units[:3], cells, order=1).model_copy(update={"patterns": ("###", "-#.", "#..")})
    rows = Inheritance(plan, StepClock(STEPS[:4])).rows
    places = {1: [0.0], 2: [0.0]}
    assert rows.at(1.0, 0.0, places, [[1.0]] * 3).computes == (False, True, False)
    both = rows.at(2.0, 0.0, places, [[1.0]] * 3)
    assert both.computes == (True, True, False)
    assert both.pattern is None
    assert set(both.weights) == {2}
