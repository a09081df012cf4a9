"""QALoRA as a method: what `ptq` found, made better by learning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from diffpress.calibration.guidance import find_guidance
from diffpress.calibration.partway import scheduler_in_use
from diffpress.calibration.trajectory import Trajectories

from .. import ptq
from ..attention import learnable
from ..changes import Changes
from ..importance import step_importance
from ..options import Qalora
from ..overlay import frozen
from ..result import QuantizationResult, changes_of, load_result, save_result
from ..stage import Cost, Running, Subject
from ..stage import Report as StageReport
from ..stage_folder import StageFolder
from .blocks import learn_blocks
from .layer import QaloraLayer
from .memory import learning_disk_bytes
from .order import check_order, fitting_order, learning_bytes, settle_order
from .student import Student
from .train import EVALUATIONS, Report, evaluate_every, learn
from .training_data import StudentRollouts, TrainingData, images_per_round, rollout_bytes

ROLLOUT_CONDITIONS = 512
"""Different conditions that a student may sample while it learns."""
LEARNING = 5
"""What learning from a call takes, over what the call itself takes: forwards, backwards, and the rounding in both."""


def check(subject: Subject, options: Qalora) -> None:
    """Raises RecipeError or UnsupportedModelError where `ptq` does, or where an order is asked for that there is not."""
    ptq.check(subject, options)
    if subject.denoises:
        subject.check_alone("quantize.method qalora")
        check_order(subject.model, options)


def estimate(subject: Subject, options: Qalora, running: Running) -> Cost:
    """What `ptq` takes, and what learning takes beside: optimizer steps, rollouts and whole runs to evaluate by."""
    start = ptq.estimate(subject, options, running)
    if not subject.denoises:
        return start
    image_seconds = running.step_seconds / subject.batch
    every = evaluate_every(options.iterations)
    images = images_per_round(every, options.batch, running.steps)
    runs = EVALUATIONS * options.rollout_share * 2 * images + (EVALUATIONS + 2) * options.validation_images
    seconds = image_seconds * (options.iterations * options.batch * LEARNING + runs * running.steps)
    needed = learning_bytes(subject, options)
    details = {"learning_bytes": needed, "order": options.order or fitting_order(subject, needed)}
    rollouts = rollout_bytes(options, every, running.steps, running.run_bytes)
    disk_bytes = start.disk_bytes + rollouts + learning_disk_bytes(subject.model, options)
    return Cost({**start.seconds, "learn": seconds}, disk_bytes, details)


def run(subject: Subject, options: Qalora, folder: StageFolder, report: StageReport) -> Changes:
    """The method `qalora`. Raises UserError as `ptq` does, and LearningError where the loss is not finite."""
    found = _start(subject, options, folder.path / "start.safetensors", report)
    if not subject.denoises:
        return changes_of(found, subject.forms)
    options = options.model_copy(update={"order": settle_order(subject, options, folder.path)})

    def progress(done: int, total: int, loss: float) -> None:
        report(f"learn, loss {loss:.2e}", done, total)

    runs = student_rollouts(subject, options, folder.path)
    learn_layers_(found, subject.model, subject.trajectories, runs, options, subject.seed, progress)
    return replace(changes_of(found, subject.forms), settled={"quantize.order": options.order})


def _start(subject: Subject, options: Qalora, path: Path, report: StageReport) -> QuantizationResult:
    """What `ptq` finds; a run that was killed while it learned does not search again."""
    found = load_result(path)
    if found is None:
        found = ptq.quantize(subject, options, report)
        save_result(found, path)
    return found


def student_rollouts(subject: Subject, options: Qalora, folder: Path) -> StudentRollouts:
    """What a student samples while it learns, and what it is evaluated by: the first of the subject's conditions."""
    conditions = subject.conditions(options.validation_images + ROLLOUT_CONDITIONS)
    validation, wanted = conditions[: options.validation_images], conditions[options.validation_images :]
    return StudentRollouts(subject.pipeline, wanted, validation, subject.sampling, folder, subject.batch)


def learn_layers_(
    found: QuantizationResult,
    denoiser: nn.Module,
    trajectories: Trajectories,
    runs: StudentRollouts,
    options: Qalora,
    seed: int,
    report: Report | None = None,
    layer_type: type[QaloraLayer] = QaloraLayer,
) -> None:
    """Replace the layers of `found` whose weights belong to a Linear or Conv2d by learned ones; `denoiser` stays as it is.

    The teacher is `denoiser` itself, the overlay off. Raises LearningError where the loss is not finite.
    """
    start = {
        name: own for name, own in found.layers.items() if not isinstance(denoiser.get_submodule(name), nn.Embedding)
    }
    attention = learnable(found.attention)
    student = Student(denoiser, start, trajectories.timesteps, options, seed, layer_type, attention)
    # Codes take as much memory as the weights; the student has what it needs of them.
    found.layers |= {name: replace(own, codes=torch.empty(0)) for name, own in start.items()}
    del start
    with frozen(denoiser):
        steps = len(trajectories.timesteps)
        scheduler = scheduler_in_use(runs.pipeline, runs.wanted[0], runs.sampling)
        importance = step_importance(scheduler, trajectories.updates)
        images = images_per_round(evaluate_every(options.iterations), options.batch, steps)
        training_data = TrainingData(trajectories, runs, importance.sampling_probabilities, seed, images)
        if options.order == "blocks":
            progress = learn_blocks(student, training_data, importance, options, runs.folder, report)
        else:
            guidance = find_guidance(trajectories)
            progress = learn(student, training_data, importance, guidance, options, runs.folder, report)
        found.history = progress.history
    found.layers |= student.finish()
