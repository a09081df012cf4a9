"""Steps that inherit: units of a denoiser answer by forecasts of what they computed at earlier steps (A-SDM, 2406.00210)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from .clock import StepClock
from .forecast import forecast
from .forwards import Forward, Wrap, parameter_names
from .outlines import outline
from .part import RuntimePart
from .rows import Flags, Row, Rows, looked_at
from .runs import Arguments, Computed, Features, Run, hold
from .step_plan import UNUSED, StepPlan, Unit

SHORTCUT = "conv_shortcut"
"""What a resnet calls the layer that its input goes through before it is added."""


@dataclass
class Frame:
    """What the units need to know, and leave, during one call of the denoiser."""

    computes: Flags
    """Per unit."""
    weights: Mapping[int, Sequence[Tensor]]
    """Of past features, each a number, by unit that is forecast."""
    past: Mapping[int, Sequence[Features]]
    """Its past features, the latest first."""
    corrections: Sequence[Tensor] | None = None
    """Per unit [2, channels] by which its forecasts are multiplied, and what is added then."""
    made: dict[int, Features] = field(default_factory=dict)
    """By units that computed."""
    entries: dict[int, list[Any]] = field(default_factory=dict)
    """What units that compute add to."""
    shortcuts: dict[int, Tensor] = field(default_factory=dict)
    """What the shortcuts of units gave."""
    skips: Flags = ()
    """Per module that may be skipped."""
    known: Mapping[int, Any] = field(default_factory=dict)
    """Outlines of what such modules gave at earlier calls."""
    outlines: dict[int, Any] = field(default_factory=dict)
    """Of what they give at this one."""
    stands: bool = False
    """Whether it was given from outside, and no run is looked for."""


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
        return {**found, "": lambda forward: _Call(inner(forward), self, names)}

    def _skip_wrap(self, index: int, inner: Wrap) -> Wrap:
        return lambda forward: _Skippable(inner(forward), self, index)

    def _module_wraps(self, index: int, unit: Unit, name: str, module: nn.Module) -> dict[str, Wrap]:
        found: dict[str, Wrap] = {name: lambda forward: _Unit(forward, self, index, unit, name, module)}
        if any(unit.adds_to) and shortcut_of(module).layer is not None:
            found[f"{name}.{SHORTCUT}"] = lambda forward: _Shortcut(forward, self, index)
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


class _Call:
    """The forward of the denoiser."""

    def __init__(self, forward: Forward, inheritance: Inheritance, names: Sequence[str]) -> None:
        self.__wrapped__, self.inheritance, self.names = forward, inheritance, names

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        frame = self.inheritance.frame
        if frame is not None and frame.stands:
            return self.__wrapped__(*arguments, **options)
        run = self._begin(arguments, options)
        output = self.__wrapped__(*arguments, **options)
        self._end(run)
        return output

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> Run:
        return self.inheritance.begin(Arguments.of(self.names, arguments, options))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _end(self, run: Run) -> None:
        self.inheritance.end(run)


class Shortcut(NamedTuple):
    """How a module takes what it adds to: through a layer of its own, over a factor."""

    layer: nn.Module | None
    factor: float

    def __call__(self, x: Tensor, known: Tensor | None = None) -> Tensor:
        """Of the module's input; `known` is what the layer gave for it, where it was asked already."""
        if self.layer is not None:
            x = self.layer(x) if known is None else known
        return x if self.factor == 1 else x / self.factor


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


def shortcut_of(module: nn.Module) -> Shortcut:
    """By the names that diffusers has for it."""
    layer = getattr(module, SHORTCUT, None)
    factor = float(getattr(module, "output_scale_factor", getattr(module, "rescale_output_factor", 1)))
    return Shortcut(layer if isinstance(layer, nn.Module) else None, factor)


class _Shortcut:
    """The forward of what a unit's branch is added to: its answer is needed to tell the branch from the sum."""

    def __init__(self, forward: Forward, inheritance: Inheritance, index: int) -> None:
        self.__wrapped__, self.inheritance, self.index = forward, inheritance, index

    def __call__(self, x: Tensor) -> Tensor:
        output: Tensor = self.__wrapped__(x)
        frame = self.inheritance.frame
        if frame is not None:
            frame.shortcuts[self.index] = output
        return output


class _Skippable:
    """The forward of a module that is not called where nobody looks at what it gives."""

    def __init__(self, forward: Forward, inheritance: Inheritance, index: int) -> None:
        self.__wrapped__, self.inheritance, self.index = forward, inheritance, index

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        frame = self.inheritance.frame
        if frame is not None and frame.skips[self.index]:
            return frame.known[self.index]
        output = self.__wrapped__(*arguments, **options)
        # One does for a whole run, but a graph that is compiled for its first call must serve the others.
        if frame is not None and (torch.compiler.is_compiling() or self.index not in frame.known):
            frame.outlines[self.index] = outline(output)
        return output


class _Unit:
    """The forward of a unit's module: computed, or left out; the last one remembers what was added, or forecasts it."""

    def __init__(
        self, forward: Forward, inheritance: Inheritance, index: int, unit: Unit, name: str, module: nn.Module
    ) -> None:
        self.__wrapped__, self.inheritance, self.index, self.unit = forward, inheritance, index, unit
        self.first, self.last = name == unit.modules[0], name == unit.modules[-1]
        self.names = parameter_names(forward)
        self.structure: Callable[..., Any] | None = None
        self.shortcut = shortcut_of(module)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        frame = self.inheritance.frame
        if frame is None:
            return self.__wrapped__(*arguments, **options)
        if frame.computes[self.index]:
            return self._computed(frame, arguments, options)
        identity = self._identity(None, arguments, options)
        return self._given_back(self._forecast(frame, identity) if self.last else identity)

    def _computed(self, frame: Frame, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        output = self.__wrapped__(*arguments, **options)
        self.structure = type(output) if isinstance(output, dict) else None
        if self.first:
            frame.entries[self.index] = self._identity(frame.shortcuts.get(self.index), arguments, options)
        if self.last:
            identity = frame.entries[self.index]
            branches = zip(tensors_of(output), identity, strict=True)
            frame.made[self.index] = tuple(y if x is None else y - x for y, x in branches)
        return output

    def _given_back(self, tensors: list[Tensor]) -> Any:
        if self.structure is not None:
            return self.structure(*tensors)
        if self.unit.gives is None:
            return tensors[0]
        left = iter(tensors)
        return tuple(next(left) if held else None for held in self.unit.gives)

    def _identity(self, shortcut: Tensor | None, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> list[Any]:
        """What each tensor of the output is added to, or None."""
        given = dict(zip(self.names, arguments, strict=False)) | dict(options)
        return [None if name is None else self.shortcut(given[name], shortcut) for name in self.unit.adds_to]

    def _forecast(self, frame: Frame, identity: list[Any]) -> list[Tensor]:
        weights = frame.weights[self.index]
        corrections: Sequence[Tensor | None] = [None] * len(identity)
        if frame.corrections is not None:
            corrections = frame.corrections[self.index].split(self.unit.channels, 1)
        past = zip(*frame.past[self.index], strict=True)
        return [forecast(x, weights, y, own) for x, y, own in zip(identity, past, corrections, strict=True)]


def tensors_of(output: Any) -> tuple[Tensor, ...]:
    """Of what a module gave back: a tensor, a tuple of tensors and of None, or such by name."""
    parts = output.values() if isinstance(output, dict) else output
    return (output,) if isinstance(output, Tensor) else tuple(part for part in parts if part is not None)
