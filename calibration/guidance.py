"""How guidance combines a denoiser's outputs, read off what the scheduler was given."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .sampling import Call
from .trajectory import Trajectories

logger = logging.getLogger(__name__)

LINEAR = 1e-3
"""Largest relative error at which guidance counts as a weighted sum; rounding of float32 stays far below."""
ROUNDINGS = 16
"""Of half precision in a + w (b - a), for weights w up to 7.5, as shares of the result: two of the difference, one each of
the product and the sum; these bound the relative error where they are more than LINEAR."""
SHARDS = 2
"""Recorded shards that are looked at: two unknowns a step need no more."""

Weights = Mapping[tuple[int, int], Tensor]


@dataclass(frozen=True)
class Guidance:
    """guided = sum over a step's calls b and their parts j of weights[step, b][j] * part j; parts are equal runs of a batch."""

    weights: Weights
    """[parts] for a step and which of its calls it is; steps may differ in both."""
    channels: int
    """How many of the output's leading channels reach the scheduler."""

    def combine(self, output: Tensor, steps: Tensor, branches: Tensor) -> Tensor:
        """What `output` [parts * B, ...], of calls `branches` [B] of `steps` [B], adds to the guided output: [B, ...]."""
        places = zip(steps.tolist(), branches.tolist(), strict=True)
        weights = torch.stack([self.weights[place] for place in places]).to(output.device)
        parts = output[:, : self.channels].unflatten(0, (weights.shape[1], -1))
        return (parts * weights.t().reshape(*parts.shape[:2], *[1] * (parts.ndim - 2))).sum(0)


class _Equations(NamedTuple):
    """What a step says of its weights: outputs [N, parts of all calls] that make up `guided` [N]."""

    parts: tuple[int, ...]
    """Of each of the step's calls."""
    outputs: list[Tensor]
    guided: list[Tensor]


def find_guidance(trajectories: Trajectories) -> Guidance | None:
    """Solve for the weights by least squares; None, with the reason logged, where the scheduler is given no weighted sum."""
    found = _find(trajectories)
    if isinstance(found, Guidance):
        return found
    logger.warning("guidance is not known (%s): the outputs that it combines are learned each for itself", found)
    return None


def _find(trajectories: Trajectories) -> Guidance | str:
    """The guidance, or why it is not known."""
    equations: dict[int, _Equations] = {}
    channels = 0
    for calls in _updates(trajectories):
        guided, step = calls[-1].guided, calls[0].step
        if guided is None:
            return "some outputs reach no scheduler"
        guided = _once(guided)
        channels = guided.shape[1]
        if any(len(call.output) % len(guided) or call.output.shape[2:] != guided.shape[2:] for call in calls):
            return "the scheduler is given another shape than the denoiser's output"
        parts = tuple(len(call.output) // len(guided) for call in calls)
        own = equations.setdefault(step, _Equations(parts, [], []))
        if own.parts != parts:
            return f"step {step} is not guided alike each time"
        columns = [_columns(call.output[:, :channels], count) for call, count in zip(calls, parts, strict=True)]
        own.outputs.append(torch.cat(columns, 1))
        own.guided.append(guided.double().flatten())
    weights: dict[tuple[int, int], Tensor] = {}
    for step, own in sorted(equations.items()):
        solution = _solve(torch.cat(own.outputs), torch.cat(own.guided), _tolerance(trajectories))
        if solution is None:
            return "what the scheduler is given is no weighted sum of the denoiser's outputs"
        weights |= {(step, branch): part for branch, part in enumerate(solution.split(own.parts))}
    return Guidance(weights, channels)


def _updates(trajectories: Trajectories) -> Iterator[Sequence[Call]]:
    """The calls between one update of the sample and the next; the last may lack what the scheduler was given."""
    for shard in trajectories.shards[:SHARDS]:
        pending: list[Call] = []
        for call in trajectories.calls([shard]):
            if call.branch == 0 and pending:
                yield pending
                pending = []
            pending.append(call)
        yield pending


def _columns(output: Tensor, parts: int) -> Tensor:
    """[N, parts] of [parts * B, ...]."""
    return output.double().unflatten(0, (parts, -1)).flatten(1).t()


def _tolerance(trajectories: Trajectories) -> float:
    """Largest relative error of a weighted sum in the dtype that was recorded."""
    dtype = trajectories.call(trajectories.shards[0], 0).output.dtype
    return max(LINEAR, ROUNDINGS * torch.finfo(dtype).eps)


def _solve(outputs: Tensor, guided: Tensor, tolerance: float) -> Tensor | None:
    """The weights [parts] by which `outputs` [N, parts] make up `guided` [N]; None where none do."""
    solution = torch.linalg.lstsq(outputs, guided[:, None], driver="gelsd").solution.flatten()
    return None if (outputs @ solution - guided).norm() > tolerance * guided.norm() else solution.float()


def _once(guided: Tensor) -> Tensor:
    """Each image once: a pipeline such as DiT's hands its scheduler the same for both halves of the batch."""
    first, *rest = guided.chunk(2)
    return first if rest and torch.equal(first, rest[0]) else guided
