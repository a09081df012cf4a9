"""EcoDiff (2412.02852) with its masks learned as what is left will make up for what goes, from where `obs` ends.

Which units go is learned along whole sampling runs; what stays is then fitted in closed form, as in `obs`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import ceil

import torch
from torch import Tensor

from diffpress.calibration.metrics import geometric_mean_error
from diffpress.calibration.sampling import sample_in_batches

from ...changes import Changes, worn
from ...options import Masks as Options
from ...stage import Cost, Report, Running, Subject
from ...stage_folder import StageFolder
from .. import obs
from ..budget import step_of
from ..candidates import Candidates, find_candidates
from ..moments import moments_of
from ..structures import Removed
from .learning import EVALUATIONS, Learning
from .masking import Masks, predictor

IMAGES = 64
"""Images that are learned from, in turn."""
BACKWARD = 4
"""What a call takes that is made twice and gone back through, over what it takes else."""
CERTAIN = 4.0
"""Largest logit, of either sign, that a unit begins with."""


def check(subject: Subject, options: Options) -> None:
    """Raises UserError where the options do not fit the model."""
    subject.check_alone("prune.method masks")
    find_candidates(subject, options)


def estimate(subject: Subject, options: Options, running: Running) -> Cost:
    """Whole runs, back and forth, are what takes time; checkpoints are small."""
    closed = obs.estimate(subject, options, running)
    trials = (1 + EVALUATIONS) * options.validation_images / subject.batch * running.steps
    learned = options.iterations * ceil(options.batch / subject.batch) * BACKWARD * running.steps
    seconds = (2 + EVALUATIONS) * closed.seconds["prune"] + (trials + learned) * running.step_seconds
    # No more units than rows, each of which one writes.
    units = sum(form.shape[0] for form in subject.forms.values() if form.shape)
    return Cost({"prune": seconds}, closed.disk_bytes + 2 * 4 * (4 * 4 * units + 4))


def run(subject: Subject, options: Options, folder: StageFolder, report: Report) -> Changes:
    """The method. Raises UserError where the options do not fit the model, LearningError where the loss is not finite."""
    candidates = find_candidates(subject, options)
    measured = obs.measure(subject, candidates, options, partial(report, "prune, looking at inputs"))
    target = candidates.target(options)
    first = measured.removed(target)
    error_of = _error_of(subject, options, candidates, report)

    def trial(logits: Mapping[str, Tensor]) -> tuple[float, Removed]:
        removed = lowest(candidates, options, logits, target)
        return error_of(removed), removed

    learning = Learning(
        subject,
        options,
        _masks(subject, candidates, report),
        candidates.weights.units,
        target,
        start_logits(candidates, measured, first),
        subject.conditions(options.validation_images + IMAGES)[options.validation_images :],
        trial,
        folder.path / "masks",
    )
    best, history = learning.run(first, error_of(first), partial(report, "prune, learning"))
    changes = obs.compensated(subject, candidates.structures, best, report)
    rows = [{"removal": row["iteration"], "loss": row["loss"], "evaluation": row["evaluation"]} for row in history]
    return Changes(changes.edits, changes.tensors, changes.notes, tuple(rows))


def _masks(subject: Subject, candidates: Candidates, report: Report) -> Masks:
    model, structures, trajectories = subject.model, candidates.structures, subject.trajectories
    moments = moments_of(
        model,
        candidates.readers,
        trajectories,
        trajectories.shards,
        subject.seed,
        progress=partial(report, "prune, looking at inputs"),
    )
    predictors = {
        name: predictor(
            model.get_submodule(name),
            own,
            [(part, structure.count) for structure in structures for part in structure.readers if part.module == name],
        )
        for name, own in moments
    }
    return Masks(model, structures, predictors, {})


def start_logits(candidates: Candidates, measured: obs.Measured, first: Removed) -> dict[str, Tensor]:
    """[units] how far what a unit's removal costs, for what it weighs, is above or below what decides: its logarithm."""
    costs: dict[str, Tensor] = {}
    for own in candidates.structures:
        slopes = torch.full((own.count,), torch.inf)
        for slope, low, high in measured.curves[own.name].slopes():
            slopes[list(measured.orders[own.name][low:high])] = max(slope, 1e-30)
        costs[own.name] = slopes
    last = max((float(costs[name][list(units)].max()) for name, units in first.items() if units), default=1.0)
    return {name: ((own / last).log()).clamp(-CERTAIN, CERTAIN) for name, own in costs.items()}


def lowest(candidates: Candidates, options: Options, logits: Mapping[str, Tensor], target: float) -> Removed:
    """The units with the lowest logits, as many as weigh `target` together; whole steps of each structure, not all of it."""
    orders = {name: own.argsort().tolist() for name, own in logits.items()}
    counts = dict.fromkeys(orders, 0)
    steps = {own.name: step_of(own.count, options.multiple) for own in candidates.structures}
    most = {own.name: own.count - steps[own.name] for own in candidates.structures}
    left = target
    while left > 1e-9 * target:
        heights = {
            name: float(logits[name][orders[name][count : count + steps[name]]].mean())
            for name, count in counts.items()
            if count < most[name]
        }
        if not heights:
            break
        name = min(heights, key=lambda name: heights[name])
        counts[name] += steps[name]
        left -= steps[name] * candidates.weights.units[name]
    return {name: orders[name][:count] for name, count in counts.items()}


def _error_of(subject: Subject, options: Options, candidates: Candidates, report: Report) -> Callable[[Removed], float]:
    """How far images that nothing was recorded of, and nothing is learned from, end from the original's."""
    held_out = subject.conditions(options.validation_images)
    expected = sample_in_batches(subject.pipeline, held_out, subject.sampling, subject.batch).latents

    def error(removed: Removed) -> float:
        changes = obs.compensated(subject, candidates.structures, removed, report)
        with worn(subject.model, changes, subject.timesteps):
            found = sample_in_batches(subject.pipeline, held_out, subject.sampling, subject.batch).latents
        return geometric_mean_error(found, expected)

    return error
