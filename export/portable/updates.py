"""Schedulers that draw noise or clip, as tables: what they compute is followed on a basis, draw by draw and clip by clip."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import UnsupportedModelError
from .manifest import Operation, SchedulerTable

A_CALL = 6
"""Terms that a call may add: its output, what is drawn and clipped after it, and the next sample."""
CLIPS = (torch.clamp, torch.clip, Tensor.clamp, Tensor.clip)
NOISES = (torch.randn, torch.randn_like, torch.normal, Tensor.normal_)


class _Follow(TorchFunctionMode):
    """Answers what a scheduler draws from the pipeline's generator, and what it clips of a whole sample."""

    def __init__(self, scheduler: Any, generator: torch.Generator, shape: torch.Size) -> None:
        super().__init__()
        self.scheduler, self.generator, self.shape = scheduler, generator, shape

    def draw(self) -> Tensor:
        """The next noise."""
        raise NotImplementedError

    def clip(self, x: Tensor, low: float | None, high: float | None) -> Tensor:
        """A whole sample between two numbers."""
        raise NotImplementedError

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[Any],
        arguments: tuple[Any, ...] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        options = options or {}
        if function in NOISES:
            if options.get("generator") is not self.generator:
                raise UnsupportedModelError(
                    f"{type(self.scheduler).__name__} draws noise, and from no generator in this pipeline, so that an export "
                    "could not give the same images. Take a scheduler without noise, such as DDIM, Euler or DPM-Solver++."
                )
            return self.draw()
        if function in CLIPS and arguments[0].shape == self.shape:
            low, high = _limits(arguments[1:], options)
            if all(limit is None or isinstance(limit, (int, float)) for limit in (low, high)):
                return self.clip(arguments[0], low, high)
        return function(*arguments, **options)


def _limits(positional: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, Any]:
    given = {**dict(zip(("min", "max"), positional, strict=False)), **named}
    return given.get("min"), given.get("max")


class _Trace(_Follow):
    """Gives every term its own basis vector, and keeps what was done."""

    def __init__(self, scheduler: Any, generator: torch.Generator, calls: int) -> None:
        size = 1 + A_CALL * calls
        super().__init__(scheduler, generator, torch.Size((1, size, 1, 1)))
        self.terms = 0
        self.operations: list[Operation] = []

    def term(self) -> Tensor:
        """The next term."""
        if self.terms >= self.shape[1]:
            raise UnsupportedModelError(
                f"{type(self.scheduler).__name__} draws and clips more than {A_CALL - 2} times a step: it cannot be exported."
            )
        vector = torch.zeros(self.shape, dtype=torch.float64)
        vector[0, self.terms] = 1
        self.terms += 1
        return vector

    def draw(self) -> Tensor:
        self.operations.append(Operation())
        return self.term()

    def clip(self, x: Tensor, low: float | None, high: float | None) -> Tensor:
        self.operations.append(Operation(weights=_row(x), low=low, high=high))
        return self.term()


def _row(x: Tensor) -> tuple[tuple[int, float], ...]:
    values = x.flatten().tolist()
    return tuple((term, value) for term, value in enumerate(values) if value)


def trace_updates(scheduler: Any, seeded: bool) -> SchedulerTable:
    """The table of a scheduler whose steps are set, by its updates; `seeded` says whether the pipeline hands its generator on.

    Raises UnsupportedModelError where it draws noise from elsewhere.
    """
    generator = torch.Generator()
    follow = _Trace(scheduler, generator, len(scheduler.timesteps))
    scales: list[float] = []
    updates: list[tuple[Operation, ...]] = []
    sample = follow.term()
    for timestep in scheduler.timesteps:
        scaled = _scaled(scheduler, sample, timestep)
        largest = int(sample.abs().argmax())
        scales.append(float(scaled.flatten()[largest] / sample.flatten()[largest]))
        follow.operations = []
        output = follow.term()
        with follow:
            found = _step(scheduler, output, timestep, sample, generator if seeded else None)
        updates.append((*follow.operations, Operation(weights=_row(found))))
        sample = follow.term()
    return SchedulerTable(
        init_noise_sigma=float(getattr(scheduler, "init_noise_sigma", 1.0)),
        timesteps=tuple(float(timestep) for timestep in scheduler.timesteps),
        input_scale=tuple(scales),
        coefficients=(),
        updates=tuple(updates),
    )


def is_linear(table: SchedulerTable) -> bool:
    """Whether a table by updates neither draws nor clips."""
    return all(len(update) == 1 for update in table.updates or ())


class _Replay(_Follow):
    """Lets the scheduler clip, and gives it noise that is kept."""

    def __init__(self, scheduler: Any, generator: torch.Generator, shape: torch.Size, values: torch.Generator) -> None:
        super().__init__(scheduler, generator, shape)
        self.values = values
        self.drawn: list[Tensor] = []

    def draw(self) -> Tensor:
        with torch._C.DisableTorchFunction():
            self.drawn.append(torch.randn(self.shape, generator=self.values, dtype=torch.float64))
        return self.drawn[-1]

    def clip(self, x: Tensor, low: float | None, high: float | None) -> Tensor:
        with torch._C.DisableTorchFunction():
            return x.clamp(low, high)


def probe_updates(scheduler: Any, table: SchedulerTable, seeded: bool, seed: int, spread: float) -> float:
    """Largest difference between the table and a real run on random numbers, relative to the run's largest value."""
    values, generator = torch.Generator().manual_seed(seed), torch.Generator()
    shape = torch.Size((1, 3, 4, 4))
    replay = _Replay(scheduler, generator, shape, values)
    sample = spread * torch.randn(shape, generator=values, dtype=torch.float64)
    terms, worst, largest = [sample], 0.0, float(sample.abs().max())
    for call, timestep in enumerate(scheduler.timesteps):
        scaled = _scaled(scheduler, sample, timestep)
        worst = max(worst, float((scaled - sample * table.input_scale[call]).abs().max()))
        terms.append(spread * torch.randn(shape, generator=values, dtype=torch.float64))
        replay.drawn = []
        with replay:
            sample = _step(scheduler, terms[-1], timestep, sample, generator if seeded else None)
        terms += _applied(table.updates[call] if table.updates else (), terms, replay.drawn)
        worst = max(worst, float((sample - terms[-1]).abs().max()))
        largest = max(largest, float(sample.abs().max()))
        terms[-1] = sample
    return worst / largest


def _applied(update: tuple[Operation, ...], terms: list[Tensor], drawn: list[Tensor]) -> list[Tensor]:
    known, noises = list(terms), iter(drawn)
    for own in update:
        if own.weights is None:
            known.append(next(noises))
            continue
        total = torch.zeros_like(terms[0])
        for term, weight in own.weights:
            total = total + weight * known[term]
        known.append(total if own.low is None and own.high is None else total.clamp(own.low, own.high))
    return known[len(terms) :]


def _scaled(scheduler: Any, sample: Tensor, timestep: Any) -> Tensor:
    scales = getattr(scheduler, "scale_model_input", None)
    return sample if scales is None else scales(sample, timestep)


def _step(scheduler: Any, output: Tensor, timestep: Any, sample: Tensor, generator: torch.Generator | None) -> Tensor:
    found: Tensor = scheduler.step(output, timestep, sample, return_dict=False, **step_extras(scheduler, generator))[0]
    return found


def step_extras(scheduler: Any, generator: torch.Generator | None) -> dict[str, Any]:
    """What pipelines that hand their generator on give a step beside what every step is given: their own default of `eta`."""
    given = {} if generator is None else {"generator": generator, "eta": 0.0}
    takes = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in given.items() if name in takes}
