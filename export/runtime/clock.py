"""Which sampling step it is, told by the time step the denoiser is called with."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffpress.kernels import code_range

ALIGNED = 16
"""Bytes between entries that are looked up together: Triton compiles a kernel anew for addresses that are no multiples."""


@dataclass
class _Lookup:
    """Entries of tables at the current step: those that the step before asked for are looked up all at once.

    A layer that reads its own takes as many operations for one number as it takes for everything else.
    """

    codes: bool
    """Whether the tables are of zero points, whose entries are codes."""
    asked: dict[int, Tensor] = field(default_factory=dict)
    known: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def begin(self, weights: Tensor) -> None:
        """Another step."""
        alike: dict[Any, list[Tensor]] = defaultdict(list)
        for table in self.asked.values():
            alike[table.device, table.dtype, table.shape].append(table)
        self.asked, self.known = {}, {}
        for tables in alike.values():
            entries = self._entries(torch.stack(tables), weights)
            apart = entries.expand(-1, ALIGNED // entries.element_size()).contiguous()[:, :1].unbind()
            self.known |= {id(table): (table, entry) for table, entry in zip(tables, apart, strict=True)}

    def entry(self, table: Tensor, weights: Tensor) -> Tensor:
        """[1] of `table` [steps]."""
        # A graph holds for all steps.
        if torch.compiler.is_compiling():
            return self._entries(table, weights)
        self.asked[id(table)] = table
        known, entry = self.known.get(id(table), (None, None))
        return entry if known is table and entry is not None else self._entries(table, weights)

    def _entries(self, tables: Tensor, weights: Tensor) -> Tensor:
        """[..., 1] of [..., steps]."""
        entries = (tables * weights.to(tables.device)).sum(-1, keepdim=True)
        return entries.round().clamp(*code_range(8)).to(torch.int32) if self.codes else entries


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
        self._numbers, self._codes = _Lookup(codes=False), _Lookup(codes=True)

    def set(self, timestep: Tensor | float) -> None:
        """Move to `timestep`; between two known steps the tables are interpolated, outside them held."""
        now = torch.as_tensor(timestep).float().flatten()[:1]
        known = torch.tensor(self.timesteps, device=now.device)
        passed = (known[:-1] - now) / (known[:-1] - known[1:])
        position = passed.clamp(0, 1).sum()
        self.weights = (1 - (position - torch.arange(len(known), device=now.device)).abs()).clamp(min=0)
        if not torch.compiler.is_compiling():
            self._numbers.begin(self.weights)
            self._codes.begin(self.weights)

    def follow(self, denoiser: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Set by the time step of a call of `denoiser` that is about to begin: a forward pre-hook."""
        timestep = find_timestep(denoiser, arguments, options)
        if timestep is not None:
            self.set(timestep)

    def select(self, table: Tensor) -> Tensor:
        """The entry [1] of `table` [steps] for the current step."""
        return self._numbers.entry(table, self.weights)

    def select_code(self, table: Tensor) -> Tensor:
        """The same of zero points: an int32 that is a code of eight bits."""
        return self._codes.entry(table, self.weights)


def find_timestep(denoiser: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Tensor | float | None:
    """The time step among the arguments of one call of `denoiser`."""
    bound = inspect.signature(denoiser.forward).bind(*arguments, **options)
    return bound.arguments.get("timestep")


def attach_clock_(denoiser: nn.Module, clock: StepClock) -> RemovableHandle:
    """Set `clock` before every call of `denoiser`; a deep copy of the denoiser gets a clock of its own."""
    return denoiser.register_forward_pre_hook(clock.follow, with_kwargs=True)
