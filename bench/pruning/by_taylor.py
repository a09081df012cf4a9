"""Diff-Pruning: what the denoiser's loss changes by, to first order, without a unit (Fang et al. 2023, arXiv 2305.10924).

The score of a unit is the sum of |w g| over its weights, with g the gradient of the denoising loss summed over steps. No data
is asked for: what is noised anew are the original's own images, under what they were made for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from once import once
from shares import lowest_of_all, lowest_of_each
from torch import Tensor, nn

from diffpress.calibration.sampling import Call, answer, timestep_of
from diffpress.compress.changes import Changes
from diffpress.compress.data_flow import first_argument
from diffpress.compress.options import Magnitude
from diffpress.compress.prune.candidates import find_candidates
from diffpress.compress.prune.cutting import cut
from diffpress.compress.prune.structures import Part, Structure, columns
from diffpress.compress.stage import Subject

SHARDS = 4
"""Recorded shards whose images are noised, at every step."""


def prune(row: str, subject: Subject, options: Magnitude) -> Changes:
    """`taylor` ranks all units by their scores a parameter, `taylor-even` those of each structure, as Diff-Pruning does."""
    candidates = find_candidates(subject, options)
    products = once(subject.model, "products", lambda: first_order(subject))
    scores = {own.name: scores_of(subject.model, own, products) for own in candidates.structures}
    choose = lowest_of_each if row.endswith("-even") else lowest_of_all
    return cut(subject, candidates.structures, choose(candidates, options, scores))


def first_order(subject: Subject) -> dict[str, Tensor]:
    """|w g| of every parameter."""
    model, scheduler, trajectories = subject.model, subject.pipeline.scheduler, subject.trajectories
    generator = torch.Generator().manual_seed(subject.seed)
    model.zero_grad()
    for shard in trajectories.shards[:SHARDS]:
        calls = list(trajectories.calls([shard]))
        clean = last_sample(model, scheduler, calls[-1])
        for call in calls:
            loss(model, scheduler, call, clean, generator).backward()
    gradients = {
        name: (own.detach() * own.grad).abs() if own.grad is not None else torch.zeros_like(own)
        for name, own in model.named_parameters()
    }
    model.zero_grad()
    return gradients


def last_sample(model: nn.Module, scheduler: Any, call: Call) -> Tensor:
    """What the original made: the last recorded step once more, without noise."""
    assert call.guided is not None
    sample = call.inputs[first_argument(model)][: len(call.guided)]
    prediction = call.guided[:, : sample.shape[1]]
    found = scheduler.step(prediction, int(timestep_of(call.inputs)), sample)
    return found.pred_original_sample


def loss(model: nn.Module, scheduler: Any, call: Call, clean: Tensor, generator: torch.Generator) -> Tensor:
    """Of denoising `clean` images [N, ...] with new noise, at the step and under the conditions of a recorded call."""
    name, time = first_argument(model), torch.tensor([int(timestep_of(call.inputs))])
    noise = torch.randn(clean.shape, generator=generator)
    x = scheduler.add_noise(clean, noise, time)
    wanted = {
        "epsilon": lambda: noise,
        "sample": lambda: clean,
        "v_prediction": lambda: scheduler.get_velocity(clean, noise, time),
    }[scheduler.config.prediction_type]()
    branches = len(call.inputs[name]) // len(clean)
    with torch.enable_grad():
        found = answer(model, {**call.inputs, name: torch.cat([x] * branches)}, call.output.dtype)
        return F.mse_loss(found[:, : clean.shape[1]], torch.cat([wanted] * branches))


def scores_of(model: nn.Module, structure: Structure, products: Mapping[str, Tensor]) -> Tensor:
    """[units] sums over all weights that go with a unit."""
    return torch.stack(
        [
            sum((own.sum() for own in weights_of(model, structure, unit, products)), torch.zeros(()))
            for unit in range(structure.count)
        ]
    )


def weights_of(model: nn.Module, structure: Structure, unit: int, products: Mapping[str, Tensor]) -> Sequence[Tensor]:
    """What belongs to one unit of every parameter that has any."""

    def of(part: Part) -> list[Tensor]:
        own = model.get_submodule(part.module).named_parameters(recurse=False)
        return [products[f"{part.module}.{name}"][part.places([unit])] for name, _ in own]

    read = [products[f"{part.module}.weight"].flatten(1) for part in structure.readers]
    return [
        *(own for part in structure.writers for own in of(part)),
        *(own[:, columns(model, part, [unit])] for own, part in zip(read, structure.readers, strict=True)),
    ]
