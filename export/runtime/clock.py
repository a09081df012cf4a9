"""Which sampling step it is, told by the time step the denoiser is called with."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
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
        """`timesteps`: the scheduler's time steps the tables were made for, falling strictly."""
        self.timesteps = tuple(float(value) for value in timesteps)
        self.weights = torch.zeros(len(self.timesteps))
        self.weights[0] = 1.0

    def set(self, timestep: Tensor | float) -> None:
        """Move to `timestep`; between two known steps the tables are interpolated, outside them held."""
        now = torch.as_tensor(timestep).float().flatten()[:1]
        known = torch.tensor(self.timesteps, device=now.device)
        passed = (known[:-1] - now) / (known[:-1] - known[1:])
        position = passed.clamp(0, 1).sum()
        self.weights = (1 - (position - torch.arange(len(known), device=now.device)).abs()).clamp(min=0)

    def select(self, table: Tensor) -> Tensor:
        """The entry [1] of `table` [steps] for the current step."""
        return (table * self.weights.to(table.device)).sum(0, keepdim=True)


def find_timestep(denoiser: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Tensor | float | None:
    """The time step among the arguments of one call of `denoiser`."""
    bound = inspect.signature(denoiser.forward).bind(*arguments, **options)
    return bound.arguments.get("timestep")


def attach_clock_(denoiser: nn.Module, clock: StepClock) -> RemovableHandle:
    """Set `clock` before every call of `denoiser`."""

    def follow(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        timestep = find_timestep(module, arguments, options)
        if timestep is not None:
            clock.set(timestep)

    return denoiser.register_forward_pre_hook(follow, with_kwargs=True)
