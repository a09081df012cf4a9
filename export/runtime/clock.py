"""Which sampling step it is, told by the time step the denoiser is called with; every thread has its own."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffpress.kernels import code_range

from .entries import StepEntries, is_plain
from .forwards import parameter_names

TIMESTEPS = ("timestep", "timesteps", "t", "time", "timestep_ratio", "sigma", "r")
"""What denoisers call the argument that tells the time step; of several that they have, the first here."""
LONGER = re.compile(r"timestep\w+|\w+_time")
"""What those call it that have none of these, such as one for each of two samples."""


class StepClock:
    """The current step, as interpolation weights over the steps a table was made for.

    The time step itself is looked up, never a counter of calls, so guidance in two calls, skipped calls and other step
    counts cannot desynchronise it. `weights` [steps] sum to one and are one-hot at a step the table knows. They belong to
    the thread that set them: pipelines that share a denoiser may each be at a step of their own.
    """

    def __init__(self, timesteps: Sequence[float]) -> None:
        """`timesteps`: the time steps the tables were made for. Raises ValueError unless they all fall, or all rise."""
        self.timesteps = tuple(float(value) for value in timesteps)
        if not self.timesteps or not _monotone(self.timesteps):
            raise ValueError(f"timesteps must fall strictly, or rise, got {list(self.timesteps)}")
        # The device is named because clocks are made while a model is built empty, on the meta device.
        self.first = torch.eye(1, len(self.timesteps), device="cpu")[0]
        known = torch.tensor(self.timesteps, device="cpu").tolist()
        self._steps = {timestep: step for step, timestep in enumerate(known)}
        self._thread = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy follows its own denoiser, from the first step on.
        return type(self), (self.timesteps,)

    @property
    def weights(self) -> Tensor:
        """Of this thread; the first step's until it is set."""
        return getattr(self._thread, "weights", self.first)

    @weights.setter
    def weights(self, value: Tensor) -> None:
        self._stand_at(value, _only_step(value))

    def _stand_at(self, weights: Tensor, step: int | None) -> None:
        self._thread.weights, self._thread.step, self._thread.has_moved = weights, step, True

    @property
    def position(self) -> float:
        """Of this thread among the steps, counted from 0; between two of them where the time step is."""
        step = getattr(self._thread, "step", None)
        if step is not None:
            return float(step)
        weights = self.weights.double().cpu()
        return float(weights @ torch.arange(len(weights), dtype=torch.double))

    def set(self, timestep: Tensor | float) -> None:
        """Move to `timestep` (see `time_of`); between known steps tables are interpolated, outside them held."""
        step = self._known_step(timestep)
        if step is None:
            self.weights = step_weights(self.timesteps, time_of(torch.as_tensor(timestep)))
        else:
            self._stand_at(self.first.roll(step), step)

    def _known_step(self, timestep: Tensor | float) -> int | None:
        """The step that has all the weight, where a look at `timestep` costs nothing: every call of a denoiser asks."""
        if torch.compiler.is_compiling():
            return None
        if type(timestep) is Tensor and timestep.is_cpu:
            return self._steps.get(time_of(timestep).float().item())
        return None if isinstance(timestep, Tensor) else self._steps.get(float(np.float32(timestep)))

    def follow(self, denoiser: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Set by the time step of a call of `denoiser` that is about to begin: a forward pre-hook."""
        timestep = find_timestep(denoiser, arguments, options)
        if timestep is not None:
            self.set(timestep)

    @contextmanager
    def standing_at(self, weights: Tensor) -> Iterator[None]:
        """In this thread, while the context lasts."""
        before, self.weights = self.weights, weights
        try:
            yield
        finally:
            self.weights = before

    def select(self, table: Tensor) -> Tensor:
        """The entry [1] of `table` [steps] for the current step; with weights [B, steps] for each of them [B, 1].

        Each layer asks for its own while it runs: before that its tensors may be on another device, or on disk.
        """
        plain = is_plain(table) and self.weights.ndim == 1
        if plain and table.is_cpu:
            step = getattr(self._thread, "step", None)
            if step is not None:
                return table[step : step + 1]
        return self._entries("values").of(table) if plain else self._weighted(table, keepdim=True)

    def select_code(self, table: Tensor) -> Tensor:
        """The same of zero points, whole numbers: an int32 that is a code of eight bits."""
        if is_plain(table) and self.weights.ndim == 1:
            return self._entries("codes").of(table)
        return _codes(self.select(table))

    def _entries(self, name: str) -> StepEntries:
        thread = self._thread
        if getattr(thread, "has_moved", True):
            thread.values = StepEntries(self._weighted, getattr(thread, "values", None))
            before = getattr(thread, "codes", None)
            thread.codes = StepEntries(lambda tables: _codes(self._weighted(tables)), before)
            thread.has_moved = False
        entries: StepEntries = getattr(thread, name)
        return entries

    def _weighted(self, tables: Tensor, keepdim: bool = False) -> Tensor:
        return (tables * self.weights.to(tables.device)).sum(-1, keepdim=keepdim)


def _codes(values: Tensor) -> Tensor:
    return values.round().clamp(*code_range(8)).to(torch.int32)


def step_weights(timesteps: Sequence[float], now: Tensor) -> Tensor:
    """Linear interpolation over `timesteps` [S] at the time steps `now` [...]: weights [..., S] that sum to one."""
    now = now.float()[..., None]
    known = (_kept_on_device if now.is_cuda and is_plain(now) else _on_device)(tuple(timesteps), now.device)
    passed = (known[:-1] - now) / (known[:-1] - known[1:])
    position = passed.clamp(0, 1).sum(-1, keepdim=True)
    return (1 - (position - torch.arange(len(known), device=now.device)).abs()).clamp(min=0)


def _on_device(timesteps: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(timesteps, device=device)


_kept_on_device = functools.lru_cache(maxsize=64)(_on_device)
"""A copy makes a GPU be waited for, and a CUDA graph that is recorded cannot read from the CPU."""


def _only_step(weights: Tensor) -> int | None:
    """The step that has all the weight, of weights whose values cost nothing to look at; None where there is none.

    Students have weights for each row of a batch.
    """
    if torch.compiler.is_compiling() or type(weights) is not Tensor or weights.ndim != 1 or not weights.is_cpu:
        return None
    step = int(weights.argmax())
    return step if weights[step] == 1 else None


def _monotone(timesteps: Sequence[float]) -> bool:
    steps = list(pairwise(timesteps))
    return all(left > right for left, right in steps) or all(left < right for left, right in steps)


def time_of(timestep: Tensor) -> Tensor:
    """The time step of a call: of one for each image the first, of one for each part of each image that of most parts.

    Parts that are given, such as the first picture of a video, have a time step of their own.
    """
    return timestep.flatten()[0] if timestep.ndim < 2 else timestep[0].flatten().median()


def time_argument(names: Iterable[str]) -> str | None:
    """Which of a denoiser's arguments tells the time step; None where none does that we know."""
    told = [name for name in names if tells_time(name)]
    return next((name for name in TIMESTEPS if name in told), None) or next(iter(told), None)


def tells_time(name: str) -> bool:
    """Whether an argument of that name says something of the time step."""
    return name in TIMESTEPS or LONGER.fullmatch(name) is not None


def timestep_name(denoiser: nn.Module) -> str | None:
    """What `denoiser` calls the argument that tells the time step; None where it has none that we know."""
    return time_argument(parameter_names(denoiser.forward))


def find_timestep(denoiser: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Tensor | float | None:
    """The time step among the arguments of one call of `denoiser`, a number or a tensor (see `time_of`); None where there
    is none.
    """
    given = dict(zip(parameter_names(denoiser.forward), arguments, strict=False)) | options
    name = time_argument(given)
    return None if name is None else given[name]


def attach_clock_(denoiser: nn.Module, clock: StepClock) -> RemovableHandle:
    """Set `clock` before every call of `denoiser`; a deep copy of the denoiser gets a clock of its own."""
    return denoiser.register_forward_pre_hook(clock.follow, with_kwargs=True)


def attached_clocks(denoiser: nn.Module) -> list[StepClock]:
    """Those that follow the calls of `denoiser`, in the order in which they were attached."""
    owners = (getattr(hook, "__self__", None) for hook in denoiser._forward_pre_hooks.values())
    return [owner for owner in owners if isinstance(owner, StepClock)]
