"""Steps that inherit: units of a denoiser answer by forecasts of what they computed at earlier steps (A-SDM, 2406.00210)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from .clock import StepClock
from .forwards import Forward, Wrap, parameter_names
from .inheriting_calls import SHORTCUT, DenoiserCall, Frame, ShortcutCall, SkippableCall, UnitCall, shortcut_of
from .part import RuntimePart
from .rows import Row, Rows, looked_at
from .runs import Arguments, Computed, Features, Run, hold
from .step_plan import UNUSED, StepPlan, Unit


class Inheritance(RuntimePart):
    """The runtime part of a step plan, with its tensors; `wraps` lays it around a denoiser.

    `damping` [steps, units, order] are the factors of a forecast's terms; `correction` [inheriting steps, 2, channels], of half
    precision, multiplies it and is added to it.
    """

    damping: Tensor
    correction: Tensor | None

    def __init__(self, plan: StepPlan, clock: StepClock) -> None:
        super().__init__(clock)
        self.plan = plan
        self.rows = Rows(plan)
        self.keeps = looked_at(plan)
        skips = skipped_modules(plan)
        self.skippable = list(dict.fromkeys(name for names in skips for name in names))
        self.skips = [tuple(name in names for name in self.skippable) for names in skips]
        self.register_buffer("damping", torch.zeros(len(plan.steps), len(plan.units), plan.order))
        neutral = torch.tensor([1.0, 0.0]).view(1, 2, 1).repeat(len(plan.inheriting), 1, plan.channels)
        self.register_buffer("correction", neutral.half() if plan.corrected else None)
        self.channels = [sum(unit.channels) for unit in plan.units]

    def exact_tensors(self) -> tuple[str, ...]:
        return self.plan.exact()

    def forward(self, step: int) -> tuple[list[list[float]], Tensor | None]:
        """Damping [units, order] of a step, and what corrects its forecasts [2, channels], where anything does.

        They are asked for by a call, as tensors of other modules are: whoever offloads this one has them here meanwhile.
        """
        row = self.rows.corrections.get(step)
        if self.correction is None or row is None:
            return self.damping[step].tolist(), None
        return self.damping[step].tolist(), self.correction[row].to(torch.float32, copy=True)

    @classmethod
    def around(cls, plan: StepPlan, model: nn.Module, clock: StepClock) -> Self:
        """Every plan is laid around `model` alike."""
        return cls(plan, clock)

    def wraps(self, model: nn.Module) -> dict[str, Wrap]:
        """What lies around the denoiser itself, its units and their shortcuts, by name."""
        names = parameter_names(model.forward)
        found: dict[str, Wrap] = {}
        for index, unit in enumerate(self.plan.units):
            # A unit of which no step looks at a forecast is computed, or skipped.
            for name in unit.modules if self.keeps[index] else ():
                found |= self._module_wraps(index, unit, name, model.get_submodule(name))
        for index, name in enumerate(self.skippable):
            found[name] = self._skip_wrap(index, found.get(name, _as_it_is))
        # A unit may be the denoiser itself.
        inner = found.get("", _as_it_is)
        return {**found, "": lambda forward: DenoiserCall(inner(forward), self, names)}

    def _skip_wrap(self, index: int, inner: Wrap) -> Wrap:
        return lambda forward: SkippableCall(inner(forward), self, index)

    def _module_wraps(self, index: int, unit: Unit, name: str, module: nn.Module) -> dict[str, Wrap]:
        found: dict[str, Wrap] = {name: lambda forward: UnitCall(forward, self, index, unit, name, module)}
        if any(unit.adds_to) and shortcut_of(module).layer is not None:
            found[f"{name}.{SHORTCUT}"] = lambda forward: ShortcutCall(forward, self, index)
        return found

    def begin(self, call: Arguments) -> Run:
        """Find the run of a call, and what its units do."""
        position = self.clock.position
        run, last = self.runs.enter(call, position, len(self.plan.steps))
        self.frame = self._frame(run, position, last)
        return run

    def end(self, run: Run) -> None:
        """Remember what was computed."""
        frame, self.frame = self.frame, None
        if frame is not None and run in self.runs.live:
            run.outlines.update(frame.outlines)
            for index, features in frame.made.items():
                held = tuple(hold(y, self.plan.storage) for y in features)
                run.remember(index, Computed(run.position, held), self.plan.kept)

    def all_computed(self) -> Frame:
        """The frame of a call in which every unit computes."""
        return Frame((True,) * len(self.plan.units), {}, {}, skips=(False,) * len(self.skippable))

    def corrections(self) -> Tensor:
        """[inheriting steps + 1, 2, channels]; the last one is for steps that nothing is to be corrected at."""
        assert self.correction is not None
        neutral = torch.tensor([1.0, 0.0]).view(1, 2, 1).to(self.correction)
        return torch.cat([self.correction, neutral.expand(1, 2, self.plan.channels)])

    @contextmanager
    def standing_in(self, frame: Frame) -> Iterator[Frame]:
        """Calls of the denoiser do what `frame` says while the context lasts, whatever step it is."""
        self.frame = replace(frame, stands=True)
        try:
            yield self.frame
        finally:
            self.frame = None

    def _frame(self, run: Run, position: float, last: float | None) -> Frame:
        places = {index: [computed.position for computed in history] for index, history in run.past.items()}
        damping, correction = self(self.rows.step(position))
        row = self.rows.at(position, last, places, damping)
        skips = (False,) * len(self.skippable) if row.pattern is None else self.skips[row.pattern]
        past = {index: self._past(run, index) for index in row.weights}
        frame = Frame(row.computes, self._weights(row, run.sample.device), past, skips=skips, known=run.outlines)
        if correction is not None and past:
            frame.corrections = correction.to(run.sample.device).split(self.channels, 1)
        return frame

    def _weights(self, row: Row, device: torch.device) -> dict[int, tuple[Tensor, ...]]:
        """One tensor for all, taken apart: to move each number by itself would take as long as a small forecast."""
        if not row.weights:
            return {}
        numbers = torch.tensor(list(row.weights.values())).to(device)
        return {unit: own.unbind() for unit, own in zip(row.weights, numbers.unbind(), strict=True)}

    def _past(self, run: Run, index: int) -> list[Features]:
        """Always as many different ones, so that what is compiled for one call serves the next."""
        features = [tuple(y.tensor() for y in computed.features) for computed in run.past[index]]
        missing = self.plan.kept - len(features)
        return features + [tuple(y.detach() for y in features[-1]) for _ in range(missing)]


def _as_it_is(forward: Forward) -> Forward:
    return forward


def skipped_modules(plan: StepPlan) -> list[tuple[str, ...]]:
    """Per pattern; where the plan knows of none these are its unused units."""
    if plan.skipped:
        return list(plan.skipped)
    return [
        tuple(name for unit, cell in zip(plan.units, row, strict=True) if cell == UNUSED for name in unit.modules)
        for row in plan.patterns
    ]
