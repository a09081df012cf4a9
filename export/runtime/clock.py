"""Which sampling step it is, told by the time step the denoiser is called with."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class StepClock:
    """The current step, as interpolation weights over the steps a table was made for.

    The time step itself is looked up, never a counter of calls, so guidance in two calls, skipped calls and other step
    counts cannot desynchronise it. `weights` [steps] sum to one and are one-hot at a step the table knows.
    """

    def __init__(self, timesteps: Sequence[float]) -> None:
        """`timesteps`: the scheduler's time steps the tables were made for. Raises ValueError unless they fall strictly."""
        self.timesteps = tuple(float(value) for value in timesteps)
        if not self.timesteps or not all(left > right for left, right in pairwise(self.timesteps)):
            raise ValueError(f"timesteps must fall strictly, got {list(self.timesteps)}")
        # The device is named because clocks are made while a model is built empty, on the meta device.
        self.weights = torch.eye(1, len(self.timesteps), device="cpu")[0]

    def set(self, timestep: Tensor | float) -> None:
        """Move to `timestep`; between two known steps the tables are interpolated, outside them held."""
        now = torch.as_tensor(timestep).float().flatten()[:1]
        known = torch.tensor(self.timesteps, device=now.device)
        passed = (known[:-1] - now) / (known[:-1] - known[1:])
        position = passed.clamp(0, 1).sum()
        self.weights = (1 - (position - torch.arange(len(known), device=now.device)).abs()).clamp(min=0)

    def follow(self, denoiser: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Set by the time step of a call of `denoiser` that is about to begin: a forward pre-hook."""
        timestep = find_timestep(denoiser, arguments, options)
        if timestep is not None:
            self.set(timestep)

    def select(self, table: Tensor) -> Tensor:
        """The entry [1] of `table` [steps] for the current step."""
        return (table * self.weights.to(table.device)).sum(0, keepdim=True)


def find_timestep(denoiser: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Tensor | float | None:
    """The time step among the arguments of one call of `denoiser`."""
    bound = inspect.signature(denoiser.forward).bind(*arguments, **options)
    return bound.arguments.get("timestep")


def attach_clock_(denoiser: nn.Module, clock: StepClock) -> RemovableHandle:
    """Set `clock` before every call of `denoiser`; a deep copy of the denoiser gets a clock of its own."""
    return denoiser.register_forward_pre_hook(clock.follow, with_kwargs=True)
