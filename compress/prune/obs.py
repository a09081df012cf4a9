"""Pruning without training: units that are least missed go, and the layers that read what is left are solved for anew.

Which units of a structure go is told by optimal brain surgeon (`surgeon`); how many of each, by what their removal costs the
denoiser's output at steps that weigh as the scheduler lets them (`budget`). In the end every layer that reads what is left is
fitted to what the original answers, on what the pruned model feeds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from diffpress.calibration.parts import in_parts
from diffpress.calibration.partway import scheduler_in_use
from diffpress.calibration.sampling import Call
from diffpress.calibration.trajectory import Progress

from ..changes import Changes, worn
from ..importance import scheduler_weights
from ..options import Obs, Removal
from ..sensitivity import Weights, measure_weights
from ..stage import Cost, Report, Running, Subject
from ..stage_folder import StageFolder
from .budget import SHARES, Curve, choose, counts_of, step_of
from .candidates import Candidates, find_candidates
from .cutting import cut
from .moments import BUDGET, CALLS, Moments, affine, matrix_shape, moments_of, spread_calls
from .structures import Removed, Structure, columns
from .surgeon import Reader, refitted, removal_order

MEASURED_SHARDS = 4
"""Recorded shards, of four or more, that nothing is fitted to until it is chosen what goes."""
MEASURED_CALLS = 16
"""Calls at which it is measured what removals cost, about."""
LOOKING = 6
"""What is replayed takes, in calls of the denoiser: twice the original and once the pruned model, and the moments of both."""
MEASURING = 64
"""Calls that measuring takes: some of them backwards, and products with every layer's weights."""


def check(subject: Subject, options: Obs) -> None:
    """Raises UserError where the options do not fit the model."""
    find_candidates(subject, options)


def estimate(subject: Subject, options: Removal, running: Running) -> Cost:
    """Calls of the denoiser are what takes time."""
    calls = LOOKING * min(CALLS, running.recorded_batches * running.steps) + MEASURING
    disk_bytes = sum(form.size_bytes for form in subject.forms.values())
    return Cost({"prune": calls * running.step_seconds}, disk_bytes)


def run(subject: Subject, options: Obs, folder: StageFolder, report: Report) -> Changes:
    """The method. Raises UserError where the options do not fit the model."""
    candidates = find_candidates(subject, options)
    measured = measure(subject, candidates, options, partial(report, "prune, looking at inputs"))
    return compensated(subject, candidates.structures, measured.removed(candidates.target(options)), report)


class Measured(NamedTuple):
    """What the recorded runs say of each structure."""

    orders: Mapping[str, Sequence[int]]
    """Its units, all but the last, in the order in which they go."""
    curves: Mapping[str, Curve]
    """What it costs that so many of them do."""

    def removed(self, target: float) -> Removed:
        """Units that weigh `target` together, at the least error."""
        return {name: self.orders[name][:count] for name, count in choose(self.curves, target).items()}


def compensated(subject: Subject, structures: Sequence[Structure], removed: Removed, report: Report) -> Changes:
    """The changes that remove these units, every layer that read them fitted to what the original answers.

    First on what the original feeds it; then, all layers together, on what the model that was pruned so does.
    """
    model = subject.model
    gone = _gone_columns(subject, structures, removed)
    trajectories = subject.trajectories
    look = partial(moments_of, model, list(gone), trajectories, trajectories.shards, subject.seed)
    matrices = {name: affine(model.get_submodule(name)) for name in gone}
    kept = {name: _others(matrices[name].shape[1], gone[name]).to(matrices[name].device) for name in gone}
    first = {
        name: refitted(matrices[name], moments, kept[name])
        for name, moments in look(progress=partial(report, "prune, fitting"))
    }
    changes = cut(subject, structures, removed, first)
    wearing = partial(worn, model, changes, subject.timesteps)
    second = {}
    for name, moments in look(wearing=wearing, progress=partial(report, "prune, fitting again")):
        # Damped towards the first fit.
        own = torch.zeros_like(matrices[name]).index_copy(1, kept[name], first[name])
        second[name] = refitted(own, moments, kept[name])
    return cut(subject, structures, removed, second)


def _gone_columns(subject: Subject, structures: Sequence[Structure], removed: Removed) -> dict[str, list[int]]:
    """Of each layer that reads units that go."""
    gone: dict[str, list[int]] = {}
    for own in structures:
        for part in own.readers if removed.get(own.name) else ():
            gone.setdefault(part.module, []).extend(columns(subject.model, part, removed[own.name]))
    return gone


def _others(count: int, gone: Sequence[int]) -> Tensor:
    kept = torch.ones(count, dtype=torch.bool)
    kept[list(gone)] = False
    return kept.nonzero()[:, 0]


def measure(subject: Subject, candidates: Candidates, options: Removal, progress: Progress) -> Measured:
    """In which order the units of each structure go, and what it costs that so many do."""
    orders: dict[str, list[int]] = {}
    curves: dict[str, Curve] = {}
    trajectories = subject.trajectories
    fitted, measured = _halves(trajectories.shards)
    calls = _weighted_calls(subject, measured)
    for part in in_parts(candidates.structures, partial(_ways_bytes, subject), BUDGET):
        readers = list(dict.fromkeys(reader.module for own in part for reader in own.readers))
        moments = dict(moments_of(subject.model, readers, trajectories, fitted, subject.seed, progress=progress))
        orders |= {own.name: removal_order(_readers(subject, own, moments)) for own in part}
        ways = [
            (own.name, count, _without(subject, own, orders[own.name][:count], moments))
            for own in part
            for count in counts_of(own.count, step_of(own.count, options.multiple))
        ]
        errors = _errors(subject, ways, calls)
        for own in part:
            counts = [count for name, count, _ in ways if name == own.name]
            weight, step = candidates.weights.units[own.name], step_of(own.count, options.multiple)
            curves[own.name] = Curve(counts, [errors[own.name, count] for count in counts], weight, step)
    return Measured(orders, curves)


def _ways_bytes(subject: Subject, structure: Structure) -> int:
    """Of the layers that read it, in as many ways as are measured."""
    shapes = [matrix_shape(subject.model.get_submodule(reader.module)) for reader in structure.readers]
    return len(SHARES) * sum(8 * out * width for out, width in shapes)


def _readers(subject: Subject, structure: Structure, moments: Mapping[str, Moments]) -> list[Reader]:
    model = subject.model
    return [
        Reader.of(
            affine(model.get_submodule(part.module)),
            moments[part.module],
            [columns(model, part, [unit]) for unit in range(structure.count)],
        )
        for part in structure.readers
    ]


def _without(
    subject: Subject, structure: Structure, units: Sequence[int], moments: Mapping[str, Moments]
) -> dict[str, Weights]:
    """The layers that read the structure, fitted to do without these units, whose columns are zero."""
    found: dict[str, Weights] = {}
    for part in structure.readers:
        layer = subject.model.get_submodule(part.module)
        matrix = affine(layer)
        kept = _others(matrix.shape[1], columns(subject.model, part, units)).to(matrix.device)
        fitted = torch.zeros_like(matrix).index_copy(1, kept, refitted(matrix, moments[part.module], kept))
        weight = layer.weight
        assert isinstance(weight, Tensor)
        fitted, bias = (fitted, None) if layer.bias is None else (fitted[:, :-1], fitted[:, -1].to(weight.dtype))
        found[part.module] = (fitted.to(weight.dtype).view_as(weight), bias)
    return found


def _errors(
    subject: Subject, ways: Sequence[tuple[str, int, Mapping[str, Weights]]], calls: Sequence[tuple[Call, float]]
) -> dict[tuple[str, int], float]:
    """What each way costs: structure, how many units go, and what the layers that read them become."""
    by_layer: dict[str, list[tuple[tuple[str, int], Weights]]] = {}
    for name, count, weights in ways:
        for layer, own in weights.items():
            by_layer.setdefault(layer, []).append(((name, count), own))
    layers = {layer: [own for _, own in known] for layer, known in by_layer.items()}
    measured = measure_weights(subject.model, layers, subject.trajectories, subject.seed, calls)
    errors: dict[tuple[str, int], float] = {}
    for layer, known in by_layer.items():
        for (way, _), error in zip(known, measured[layer], strict=True):
            errors[way] = errors.get(way, 0.0) + error
    return errors


def _halves(shards: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Shards that are fitted to, and others to measure by; the same where there is one only."""
    measured = list(shards[:: max(2, len(shards) // MEASURED_SHARDS)])
    return [shard for shard in shards if shard not in measured] or measured, measured


def _weighted_calls(subject: Subject, shards: Sequence[Path]) -> list[tuple[Call, float]]:
    """Calls spread over steps and images, each with what its squared error weighs in the last sample."""
    trajectories = subject.trajectories
    scheduler = scheduler_in_use(subject.pipeline, subject.conditions(1)[0], subject.sampling)
    weights = scheduler_weights(scheduler, trajectories.updates)
    return [
        (
            trajectories.call(shard, place),
            1.0 if weights is None else float(weights[trajectories.steps(shard)[place]]) ** 2,
        )
        for shard, place in spread_calls(trajectories, shards, MEASURED_CALLS)
    ]
