"""Steps that inherit: units of a denoiser answer by forecasts of what they computed at earlier steps (A-SDM, 2406.00210)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from .clock import StepClock
from .forwards import Forward, Wrap
from .part import RuntimePart
from .runs import Arguments, Computed, Features, Run, hold
from .step_plan import COMPUTED, UNUSED, StepPlan, Unit, forecast_weights, rows_at

IMAGE = 4
"""Axes from which on a feature is a map, whose channels are the second; others have them last."""


SHORTCUT = "conv_shortcut"
"""What a resnet calls the layer that its input goes through before it is added."""


@dataclass
class Frame:
    """What the units need to know, and leave, during one call of the denoiser."""

    computes: tuple[bool, ...]
    """Per unit."""
    unused: tuple[bool, ...]
    """Per unit, whether anything of the right shape does."""
    weights: Tensor
    """[units, kept] of past features in a forecast."""
    past: list[list[Features]]
    """Per unit that inherits its past features, the latest first."""
    correction: Tensor | None
    """[2, channels] by which forecasts are multiplied, and what is added then."""
    made: dict[int, Features] = field(default_factory=dict)
    """By units that computed."""
    entries: dict[int, list[Any]] = field(default_factory=dict)
    """What units that compute add to."""
    shortcuts: dict[int, Tensor] = field(default_factory=dict)
    """What the shortcuts of units gave."""


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
        self.cells, self.inheriting = plan.cells, plan.inheriting
        self.register_buffer("damping", torch.zeros(len(plan.steps), len(plan.units), plan.order))
        neutral = torch.tensor([1.0, 0.0]).view(1, 2, 1).repeat(len(self.inheriting), 1, plan.channels)
        self.register_buffer("correction", neutral.half() if plan.corrected else None)
        ends = np.cumsum([0, *(sum(unit.channels) for unit in plan.units)]).tolist()
        self.places = list(pairwise(ends))

    @classmethod
    def around(cls, plan: StepPlan, model: nn.Module, clock: StepClock) -> Self:
        """Every plan is laid around `model` alike."""
        return cls(plan, clock)

    def wraps(self, model: nn.Module) -> dict[str, Wrap]:
        """What lies around the denoiser itself, its units and their shortcuts, by name."""
        signature = inspect.signature(model.forward)
        found: dict[str, Wrap] = {}
        for index, unit in enumerate(self.plan.units):
            for name in unit.modules:
                found |= self._module_wraps(index, unit, name, model.get_submodule(name))
        # A unit may be the denoiser itself.
        inner = found.get("", lambda forward: forward)
        return {**found, "": lambda forward: _Call(inner(forward), self, signature)}

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
            for index, features in frame.made.items():
                held = tuple(hold(y, self.plan.storage) for y in features)
                run.remember(index, Computed(run.position, held), self.plan.kept)

    def _frame(self, run: Run, position: float, last: float | None) -> Frame:
        steps, kept = len(self.plan.steps), self.plan.kept
        row = min(round(position), steps - 1)
        planned = np.any(self.cells[rows_at(position, last, steps)], axis=0)
        computes = tuple(bool(cell) or index not in run.past for index, cell in enumerate(planned.tolist()))
        damping = self.damping[row].tolist()
        weights, past = [], []
        for index, cell in enumerate(computes):
            history = [] if cell else run.past[index]
            places = [computed.position for computed in history]
            weights.append(forecast_weights(position, places, damping[index], kept))
            features = [tuple(y.tensor() for y in computed.features) for computed in history]
            # Always as many different ones, so that what is compiled for one call serves the next.
            past.append(
                features + [tuple(y.detach() for y in features[-1]) for _ in range(len(features), kept) if features]
            )
        device = run.sample.device
        pattern = self.plan.patterns[self.plan.steps[row]]
        as_planned = computes == tuple(cell == COMPUTED for cell in pattern)
        unused = tuple(as_planned and cell == UNUSED for cell in pattern)
        return Frame(computes, unused, torch.tensor(weights).to(device), past, self._correction(row, device))

    def _correction(self, row: int, device: torch.device) -> Tensor | None:
        if self.correction is None or row not in self.inheriting:
            return None
        return self.correction[self.inheriting.index(row)].to(device)


class _Call:
    """The forward of the denoiser."""

    def __init__(self, forward: Forward, inheritance: Inheritance, signature: inspect.Signature) -> None:
        self.__wrapped__, self.inheritance, self.signature = forward, inheritance, signature

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        run = self._begin(arguments, options)
        output = self.__wrapped__(*arguments, **options)
        self._end(run)
        return output

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> Run:
        return self.inheritance.begin(Arguments.of(self.signature, arguments, options))

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


class _Unit:
    """The forward of a unit's module: computed, or left out; the last one remembers what was added, or forecasts it."""

    def __init__(
        self, forward: Forward, inheritance: Inheritance, index: int, unit: Unit, name: str, module: nn.Module
    ) -> None:
        self.__wrapped__, self.inheritance, self.index, self.unit = forward, inheritance, index, unit
        self.first, self.last = name == unit.modules[0], name == unit.modules[-1]
        self.names = list(inspect.signature(forward).parameters)
        self.structure: Callable[..., Any] | None = None
        self.shortcut = shortcut_of(module)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        frame = self.inheritance.frame
        if frame is None:
            return self.__wrapped__(*arguments, **options)
        if frame.computes[self.index]:
            return self._computed(frame, arguments, options)
        if frame.unused[self.index]:
            return self._given_back(list(frame.past[self.index][0]))
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
        weights, past = frame.weights[self.index], frame.past[self.index]
        made = [_combined(weights, list(tensors)) for tensors in zip(*past, strict=True)]
        if frame.correction is not None:
            start, end = self.inheritance.places[self.index]
            own = frame.correction[:, start:end].split(self.unit.channels, 1)
            made = [_corrected(y, scale_shift.to(y.dtype)) for y, scale_shift in zip(made, own, strict=True)]
        return [y if x is None else x + y for y, x in zip(made, identity, strict=True)]


def _combined(weights: Tensor, past: list[Tensor]) -> Tensor:
    """The sum of `past`, whose weights make one."""
    first, *rest = past
    if not rest:
        return first
    if len(rest) == 1:
        return torch.lerp(first, rest[0], weights[1].to(first.dtype))
    return first + sum(w.to(first.dtype) * (other - first) for w, other in zip(weights[1:], rest, strict=True))


def _corrected(y: Tensor, correction: Tensor) -> Tensor:
    """`y` [..., C] or [B, C, ...] by `correction` [2, C]."""
    scale, shift = correction.view(2, -1, *[1] * (y.ndim - 2)) if y.ndim >= IMAGE else correction
    return torch.addcmul(shift, y, scale)


def tensors_of(output: Any) -> tuple[Tensor, ...]:
    """Of what a module gave back: a tensor, a tuple of tensors and of None, or such by name."""
    parts = output.values() if isinstance(output, dict) else output
    return (output,) if isinstance(output, Tensor) else tuple(part for part in parts if part is not None)
