"""Which time steps a pipeline may tell its denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from diffpress.export.errors import UnsupportedModelError

TRAINING_STEPS = 1000
"""Where a scheduler does not say for how many it was made."""
ROUNDED = 2**-7
"""A time step in bfloat16 is off by so much of itself at most."""


@dataclass(frozen=True)
class Times:
    """A scheduler's time steps 0 to `last`, and what the denoiser is told for them: `scale` t + `offset`."""

    last: int
    scale: float
    offset: float

    @property
    def count(self) -> int:
        return self.last + 1

    def all(self) -> Tensor:
        """[last + 1] what the denoiser may be told at whole time steps."""
        return self._told(torch.arange(self.count, dtype=torch.double))

    def between(self, seed: int) -> Tensor:
        """[last] what it may be told at one time step drawn between each and the next."""
        drawn = torch.rand(self.last, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
        return self._told(torch.arange(self.last) + drawn)

    def _told(self, steps: Tensor) -> Tensor:
        return self.scale * steps + self.offset


def times_of(scheduler: Any, told: Sequence[float]) -> Times:
    """From what the denoiser was told in a run of `scheduler`, call by call.

    Raises UnsupportedModelError where that are not the scheduler's time steps, be they scaled or turned round.
    """
    asked = [key for key, _ in groupby(scheduler.timesteps.tolist())]
    told = list(dict.fromkeys(told))
    last = int(getattr(scheduler.config, "num_train_timesteps", TRAINING_STEPS))
    where = f"prune: {type(scheduler).__name__} asks for the time steps {_few(asked)}, and the denoiser is told {_few(told)}"
    if len(asked) != len(told) or len(asked) < 2:
        raise UnsupportedModelError(f"{where}: the ones cannot be told by the others. Leave prune out.")
    if not all(0 <= step <= last for step in asked):
        raise UnsupportedModelError(f"{where}: they are not between 0 and {last}. Leave prune out.")
    scale = (told[-1] - told[0]) / (asked[-1] - asked[0])
    times = Times(last, scale, told[0] - scale * asked[0])
    slack = ROUNDED * max(map(abs, told))
    if any(abs(scale * step + times.offset - time) > slack for step, time in zip(asked, told, strict=True)):
        raise UnsupportedModelError(f"{where}: the ones are no multiples of the others. Leave prune out.")
    return times


def _few(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values[:3])
