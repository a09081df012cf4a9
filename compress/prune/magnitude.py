"""Units with the smallest weights go: what every other way is to be measured by."""

from __future__ import annotations

import torch

from ..changes import Changes
from ..options import Magnitude
from ..stage import Cost, Report, Running, Subject
from ..stage_folder import StageFolder
from .budget import step_of
from .candidates import Candidates, find_candidates
from .cutting import cut
from .structures import Structure, columns


def check(subject: Subject, options: Magnitude) -> None:
    """Raises UserError where the options do not fit the model."""
    find_candidates(subject, options)


def estimate(subject: Subject, options: Magnitude, running: Running) -> Cost:
    """One look at the weights; nothing but the changes is written."""
    return Cost({"prune": 0.0})


def run(subject: Subject, options: Magnitude, folder: StageFolder, report: Report) -> Changes:
    """The method."""
    candidates = find_candidates(subject, options)
    counts = even_counts(candidates, options)
    removed = {own.name: smallest(subject, own, counts[own.name]) for own in candidates.structures}
    report("prune", 1, 1)
    return cut(subject, candidates.structures, removed)


def even_counts(candidates: Candidates, options: Magnitude) -> dict[str, int]:
    """The same share of every structure, the smallest that is enough in whole units, and of what is rounded up for it no more
    than is needed.
    """
    structures, target = candidates.structures, candidates.target(options)

    def counts(share: float) -> dict[str, int]:
        steps = {own.name: step_of(own.count, options.multiple) for own in structures}
        rounded = {own.name: round(share * own.count / steps[own.name]) * steps[own.name] for own in structures}
        return {own.name: min(own.count - steps[own.name], rounded[own.name]) for own in structures}

    def weight(chosen: dict[str, int]) -> float:
        return sum(count * candidates.weights.units[name] for name, count in chosen.items())

    low, high = 0.0, 1.0
    for _ in range(32):
        middle = (low + high) / 2
        low, high = (middle, high) if weight(counts(middle)) < target else (low, middle)
    chosen = counts(high)
    for name, fewer in counts(low).items():
        if weight(chosen | {name: fewer}) >= target:
            chosen[name] = fewer
    return chosen


def smallest(subject: Subject, structure: Structure, count: int) -> list[int]:
    """Units by the squares of the weights that read them."""
    squares = torch.zeros(structure.count)
    for part in structure.readers:
        weight = subject.model.get_submodule(part.module).weight
        assert isinstance(weight, torch.Tensor)
        own = weight.detach().flatten(1).float().square().sum(0).cpu()
        squares += torch.stack([own[columns(subject.model, part, [unit])].sum() for unit in range(structure.count)])
    return sorted(squares.argsort()[:count].tolist())
