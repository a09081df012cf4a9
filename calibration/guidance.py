"""How guidance combines a denoiser's outputs, read off what the scheduler was given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .trajectory import Trajectories

LINEAR = 1e-3
"""Largest relative error at which guidance counts as a weighted sum; rounding of float32 stays far below, of bfloat16 above."""

SHARDS = 2
"""Recorded shards that are looked at: two unknowns a step need no more."""


@dataclass(frozen=True)
class Guidance:
    """guided = sum over parts j of weights[step, j] * part j, the parts being equal runs of the batch."""

    weights: Tensor
    """[S, parts]"""
    channels: int
    """How many of the output's leading channels reach the scheduler."""

    def combine(self, output: Tensor, steps: Tensor) -> Tensor:
        """The guided output [B, ...] of `output` [parts * B, ...] at `steps` [B]."""
        weights = self.weights.to(output.device)[steps]
        parts = output[:, : self.channels].unflatten(0, (weights.shape[1], -1))
        return (parts * weights.t().reshape(*parts.shape[:2], *[1] * (parts.ndim - 2))).sum(0)


def find_guidance(trajectories: Trajectories) -> Guidance | None:
    """Solve for the weights by least squares; None where the scheduler is not given a weighted sum of one call's parts."""
    outputs: dict[int, list[Tensor]] = {}
    targets: dict[int, list[Tensor]] = {}
    for call in trajectories.calls(trajectories.shards[:SHARDS]):
        if call.guided is None:
            return None
        guided = _once(call.guided)
        parts, rest = divmod(call.output.shape[0], guided.shape[0])
        if rest or call.output.shape[2:] != guided.shape[2:]:
            return None
        channels = guided.shape[1]
        columns = call.output[:, :channels].double().unflatten(0, (parts, -1)).flatten(1).t()
        outputs.setdefault(call.step, []).append(columns)
        targets.setdefault(call.step, []).append(guided.double().flatten())
    rows = []
    for step in sorted(outputs):
        left, right = torch.cat(outputs[step]), torch.cat(targets[step])
        solution = torch.linalg.lstsq(left, right[:, None], driver="gelsd").solution
        if (left @ solution - right[:, None]).norm() > LINEAR * right.norm():
            return None
        rows.append(solution.flatten().float())
    return Guidance(torch.stack(rows), channels)


def _once(guided: Tensor) -> Tensor:
    """Each image once: a pipeline such as DiT's hands its scheduler the same for both halves of the batch."""
    first, *rest = guided.chunk(2)
    return first if rest and torch.equal(first, rest[0]) else guided
