"""The forwards that are laid around a denoiser whose units inherit: each computes, forecasts, or is not called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .forecast import forecast
from .forwards import Forward, parameter_names
from .outlines import outline
from .rows import Flags
from .runs import Arguments, Features, Run
from .step_plan import Unit

if TYPE_CHECKING:
    from .inheritance import Inheritance

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


class DenoiserCall:
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


def shortcut_of(module: nn.Module) -> Shortcut:
    """By the names that diffusers has for it."""
    layer = getattr(module, SHORTCUT, None)
    factor = float(getattr(module, "output_scale_factor", getattr(module, "rescale_output_factor", 1)))
    return Shortcut(layer if isinstance(layer, nn.Module) else None, factor)


class ShortcutCall:
    """The forward of what a unit's branch is added to: its answer is needed to tell the branch from the sum."""

    def __init__(self, forward: Forward, inheritance: Inheritance, index: int) -> None:
        self.__wrapped__, self.inheritance, self.index = forward, inheritance, index

    def __call__(self, x: Tensor) -> Tensor:
        output: Tensor = self.__wrapped__(x)
        frame = self.inheritance.frame
        if frame is not None:
            frame.shortcuts[self.index] = output
        return output


class SkippableCall:
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


class UnitCall:
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
