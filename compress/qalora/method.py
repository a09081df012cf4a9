"""QALoRA as a method: what `ptq` found, made better by learning."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from diffpress.calibration.guidance import find_guidance
from diffpress.calibration.trajectory import Trajectories

from ..attention import learnable
from ..options import Qalora
from ..result import QuantizationResult
from .blocks import learn_blocks
from .importance import step_importance
from .layer import QaloraLayer
from .student import Student
from .train import Report, evaluate_every, learn
from .training_data import StudentRollouts, TrainingData, images_per_round


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
    frozen = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    attention = learnable(found.attention)
    student = Student(denoiser, start, trajectories.timesteps, options, seed, layer_type, attention)
    # Codes take as much memory as the weights; the student has what it needs of them.
    found.layers |= {name: replace(own, codes=torch.empty(0)) for name, own in start.items()}
    del start
    try:
        steps = len(trajectories.timesteps)
        importance = step_importance(runs.pipeline.scheduler, steps)
        images = images_per_round(evaluate_every(options.iterations), options.batch, steps)
        training_data = TrainingData(trajectories, runs, importance.sampling_probabilities, seed, images)
        if options.order == "blocks":
            progress = learn_blocks(student, training_data, importance, options, runs.folder, report)
        else:
            guidance = find_guidance(trajectories)
            progress = learn(student, training_data, importance, guidance, options, runs.folder, report)
        found.history = progress.history
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    found.layers |= student.finish()
