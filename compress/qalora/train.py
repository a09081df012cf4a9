"""All layers together: learn from recorded calls, then from the student's own, evaluated by whole runs from noise held out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffpress.calibration.examples import Batch
from diffpress.calibration.guidance import Guidance
from diffpress.calibration.sampling import answer

from ..checkpoint import Progress, load_checkpoint, read_tensors, save_checkpoint, write_tensors
from ..importance import StepImportance
from ..options import Qalora
from .student import Student
from .trainer import Trainer
from .training_data import TrainingData, steps_per_image

EVALUATIONS = 12
"""How often, over the whole of it; each leaves a checkpoint."""
RAW = 0.1
"""Weight of the squared error of every single output, beside that of what they add up to."""

Report = Callable[[int, int, float], None]
"""Called with how many iterations are done, how many there are, and the loss."""


def learn(
    student: Student,
    training_data: TrainingData,
    importance: StepImportance,
    guidance: Guidance | None,
    options: Qalora,
    folder: Path,
    report: Report | None = None,
) -> Progress:
    """Learn for `options.iterations`, or until what is held out stops getting better; the best ends up in `student`.

    He et al. 2024, arXiv 2310.03270, eq. 7, with the inputs of the teacher's runs and then of the student's own, and the
    errors of several steps added up before they are squared. Goes on from the checkpoint in `folder`. Raises LearningError
    naming the layer where the loss is not finite; the last checkpoint stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return _Learning(student, training_data, importance, guidance, options, folder).run(report)


@dataclass
class _Learning:
    student: Student
    training_data: TrainingData
    importance: StepImportance
    guidance: Guidance | None
    options: Qalora
    folder: Path

    def __post_init__(self) -> None:
        self.trainer = Trainer(self.student, self.student.parameters(), self.training_data, self.options, self._loss)
        self.file, self.best = self.folder / "learned.safetensors", self.folder / "best.safetensors"

    def run(self, report: Report | None) -> Progress:
        options, trainer = self.options, self.trainer
        state = trainer.parameters, trainer.average, trainer.optimizer
        progress = Progress()
        if self.best.exists():
            progress = load_checkpoint(self.file, *state)
        if progress.iteration == 0:
            # Where nothing gets better, what was started from is kept.
            self._evaluate(progress, trainer.first_loss(0))
        every = evaluate_every(options.iterations)
        own_from = round(options.iterations * (1 - options.rollout_share))
        while progress.iteration < options.iterations and progress.since_best < options.patience:
            if options.rollout_share and progress.iteration >= own_from:
                self.training_data.follow(self.student, (progress.iteration - own_from) // every)
            loss = trainer.step(progress.iteration, options.iterations)
            progress.iteration += 1
            if progress.iteration % every == 0 or progress.iteration == options.iterations:
                self._evaluate(progress, loss)
                save_checkpoint(self.file, *state, progress)
                # Whoever goes on from this checkpoint follows the same rounds, or later ones.
                self.training_data.forget((progress.iteration - own_from) // every)
            if report is not None:
                report(progress.iteration, options.iterations, loss)
        read_tensors(self.best, trainer.parameters)
        return progress

    def _loss(self, batch: Batch) -> Tensor:
        """What the errors of what the scheduler is given add up to, and a little of the denoiser's own error."""
        error = answer(self.student.denoiser, batch.inputs, batch.output.dtype) - batch.output.to(self.student.device)
        given = error if self.guidance is None else self.guidance.combine(error, batch.steps, batch.branches)
        # Where guidance is not known its parts stand for themselves.
        steps = batch.steps.repeat(len(given) // len(batch.steps))
        together = steps_per_image(len(batch.steps))
        return self.importance.accumulated(given, steps, together) + RAW * error.square().mean()

    @torch.no_grad()
    def _evaluate(self, progress: Progress, loss: float) -> None:
        """Compare the moving average with the best so far, by whole sampling runs."""
        with self.trainer.averaged():
            evaluated = self.training_data.evaluate(self.student)
            # The first is kept whatever it is, so that there is something to fall back on.
            if progress.take(evaluated, loss) or len(progress.history) == 1:
                write_tensors(self.best, self.trainer.parameters)


def evaluate_every(iterations: int) -> int:
    """Iterations from one evaluation, and one round of own runs, to the next."""
    return max(1, iterations // EVALUATIONS)
