"""Which sampling run a call of the denoiser belongs to, and what that run has computed so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .clock import tells_time
from .step_plan import Storage, last_of_run

LIVE = 8
"""Runs that a thread keeps at a time: two calls a step for guidance, of a few generations that take turns."""
CHANGING = ("residual", "control", "block_samples")
"""Parts of the names of arguments that change from step to step without being the sample."""

INT8_MAX = 127
Features = tuple[Tensor, ...]
"""What one unit computed: the tensors that it gives back, less what they are added to."""


class Held(NamedTuple):
    """A feature between steps."""

    values: Tensor
    dtype: torch.dtype
    """As it was computed."""
    scale: Tensor | None = None
    """Of integers."""

    def tensor(self) -> Tensor:
        """The feature, as far as it was kept."""
        values = self.values.to(self.dtype)
        return values if self.scale is None else values * self.scale


def hold(feature: Tensor, storage: Storage) -> Held:
    """Keep a feature; int8 has one scale, of the largest magnitude."""
    if storage == "computed":
        return Held(feature, feature.dtype)
    if storage == "bfloat16":
        return Held(feature.to(torch.bfloat16), feature.dtype)
    scale = (feature.abs().amax() / INT8_MAX).clamp(min=torch.finfo(feature.dtype).tiny)
    return Held((feature / scale).round().to(torch.int8), feature.dtype, scale)


class Computed(NamedTuple):
    """Features of a unit, and the position that they were computed at."""

    position: float
    features: tuple[Held, ...]


@dataclass(eq=False)
class Run:
    """One sampling run, or one of its guidance branches where those are calls of their own."""

    sample: Tensor
    """What the latest call was asked about."""
    conditions: Mapping[str, Any]
    position: float
    past: dict[int, list[Computed]] = field(default_factory=dict)
    """Per unit, the latest first."""
    output_type: type = tuple
    """What the denoiser wrapped its answer in, the latest time."""
    outlines: dict[int, Any] = field(default_factory=dict)
    """Of what modules gave that later calls may skip."""

    def remember(self, unit: int, computed: Computed, count: int) -> None:
        """As the latest of `count` that are kept of the unit."""
        self.past[unit] = [computed, *self.past.get(unit, ())][:count]


class Arguments(NamedTuple):
    """One call of a denoiser."""

    sample: Tensor
    conditions: Mapping[str, Any]
    """All other arguments that a run keeps, by name."""

    @classmethod
    def of(cls, names: Sequence[str], arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Arguments:
        """By the names of its arguments, in their order; the first that is a tensor, or a list of them, is the sample."""
        given = dict(zip(names, arguments, strict=False)) | dict(options)
        bound = dict(_flat({name: given[name] for name in names if name in given} | given))
        sample = next(name for name, value in bound.items() if _is_sample(value))
        stays = {
            name: value
            for name, value in bound.items()
            if name != sample and not tells_time(name) and not any(part in name for part in CHANGING)
        }
        return cls(_as_one(bound[sample]), stays)


class Runs:
    """The live runs of one thread."""

    def __init__(self) -> None:
        self.live: list[Run] = []

    def enter(self, call: Arguments, position: float, steps: int) -> tuple[Run, float | None]:
        """The run of `call`, moved on to `position` of so many steps, and where it was before; None at its start."""
        run = self.continued(call, position)
        last = None if run is None else run.position
        run = run or Run(call.sample, call.conditions, position)
        run.sample, run.conditions, run.position = call.sample, call.conditions, position
        if last_of_run(position, last, steps):
            self.drop(run)
        else:
            self.keep(run)
        return run, last

    def continued(self, call: Arguments, position: float) -> Run | None:
        """The run that `call` continues at `position`: of the same shape and conditions, and not as far yet; None begins one.

        Where several fit, as without any condition, it is the one whose sample is the nearest.
        """
        fitting = [run for run in self.live if run.position < position and _continues(run, call)]
        if len(fitting) > 1:
            fitting.sort(key=lambda run: float((run.sample - call.sample).float().square().mean()))
        return fitting[0] if fitting else None

    def keep(self, run: Run) -> None:
        """As the latest; the one that was left longest goes where there are too many."""
        self.drop(run)
        self.live = [*self.live, run][-LIVE:]

    def drop(self, run: Run) -> None:
        """The run is over."""
        self.live = [other for other in self.live if other is not run]


def _flat(arguments: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif not isinstance(value, (nn.Module, bool)):
            yield prefix + name, value


def _is_sample(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, list) and any(isinstance(own, Tensor) for own in value))


def _as_one(sample: Any) -> Tensor:
    """A list of samples, which may be of different shapes, as one."""
    return sample if isinstance(sample, Tensor) else torch.cat([own.flatten() for own in sample])


def _continues(run: Run, call: Arguments) -> bool:
    return (
        run.sample.shape == call.sample.shape
        and run.sample.dtype == call.sample.dtype
        and run.sample.device == call.sample.device
        and run.conditions.keys() == call.conditions.keys()
        and all(_same(run.conditions[name], value) for name, value in call.conditions.items())
    )


def _same(known: Any, given: Any) -> bool:
    if known is given:
        return True
    if isinstance(known, Tensor) and isinstance(given, Tensor):
        return known.shape == given.shape and known.device == given.device and torch.equal(known, given)
    if isinstance(known, (list, tuple)) and isinstance(given, (list, tuple)):
        return len(known) == len(given) and all(map(_same, known, given))
    if isinstance(known, np.ndarray) or isinstance(given, np.ndarray):
        return np.array_equal(known, given)
    return not isinstance(known, Tensor) and not isinstance(given, Tensor) and bool(known == given)
