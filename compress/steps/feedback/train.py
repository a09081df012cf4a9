"""Down the loss of where the scheduler lands, evaluated by whole runs from noise held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffpress.calibration.guidance import Guidance
from diffpress.calibration.partway import output_of
from diffpress.calibration.sampling import Call, answer
from diffpress.export.errors import LearningError
from diffpress.export.runtime.feedback import computed, tensors
from diffpress.export.runtime.runs import Computed

from ...checkpoint import Progress, load_checkpoint, read_tensors, save_checkpoint, write_tensors
from ...options import Feedback
from .student import Student
from .training_data import Example, TrainingData
from .validation import Validation

EVALUATIONS = 12
"""How often, over the whole of it; each leaves a checkpoint."""
RAW = 0.1
"""Weight of the squared error of every single answer, beside that of what guidance makes of them."""
BETAS = (0.9, 0.99)
WARM_UP = 20
"""Iterations over which the learning rates rise."""
DECAY = 0.98
"""Of the moving average of everything learned, which is what is evaluated and kept."""
SCALE_RATE = 10.0
"""Learning rate of the scales, which start at zero, over that of the feedback module's weights."""

Report = Callable[[int, int, float], None]
"""Called with how many iterations are done, how many there are, and the loss."""


@dataclass
class Learning:
    """The feedback module of `student`, down to where `iterations` end or what is held out stops getting better."""

    student: Student
    training_data: TrainingData
    validation: Validation
    guidance: Guidance | None
    options: Feedback
    iterations: int
    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.parameters = self.student.parameters()
        self.average = {name: own.detach().clone() for name, own in self.parameters.items()}
        rates = [(SCALE_RATE if name == "scales" else 1.0) * self.options.rate for name in self.parameters]
        groups = [{"params": [own], "lr": rate} for own, rate in zip(self.parameters.values(), rates, strict=True)]
        self.optimizer = torch.optim.Adam(groups, betas=BETAS)
        self.rates = rates
        self.file, self.best = self.folder / "learned.safetensors", self.folder / "best.safetensors"

    def run(self, report: Report | None = None) -> Progress:
        """Go on from the checkpoint in the folder; the best ends up in the student. Raises LearningError."""
        state = self.parameters, self.average, self.optimizer
        progress = Progress()
        if self.best.exists():
            progress = load_checkpoint(self.file, *state)
        if progress.iteration == 0:
            # Where nothing gets better, the backbone with its scales of zero is kept.
            self._evaluate(progress, self._first_loss())
        every = max(1, self.iterations // EVALUATIONS)
        own_from = round(self.iterations * (1 - self.options.rollout_share))
        while progress.iteration < self.iterations and progress.since_best < self.options.patience:
            if self.options.rollout_share and progress.iteration >= own_from:
                self.training_data.follow(self.student, (progress.iteration - own_from) // every)
            loss = self._step(progress.iteration)
            progress.iteration += 1
            if progress.iteration % every == 0 or progress.iteration == self.iterations:
                self._evaluate(progress, loss)
                save_checkpoint(self.file, *state, progress)
                # Whoever goes on from this checkpoint follows the same rounds, or later ones.
                self.training_data.forget((progress.iteration - own_from) // every)
            if report is not None:
                report(progress.iteration, self.iterations, loss)
        read_tensors(self.best, self.parameters)
        return progress

    @torch.no_grad()
    def _first_loss(self) -> float:
        with self.student.learning():
            return float(self._loss(self.training_data.example(0)))

    def _step(self, iteration: int) -> float:
        rate = min(1.0, (iteration + 1) / WARM_UP) * (1 - iteration / self.iterations)
        for group, own in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = own * rate
        loss, count = 0.0, self.options.batch
        for part in range(count):
            with self.student.learning():
                found = self._loss(self.training_data.example(iteration * count + part)) / count
                found.backward()  # type: ignore[no-untyped-call]
            loss += float(found.detach())
        if not math.isfinite(loss):
            raise LearningError(
                f"steps: the loss is not finite after {iteration} iterations. The last checkpoint is kept. Lower steps.rate."
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - DECAY)
        return loss

    def _loss(self, example: Example) -> Tensor:
        """|W_k (ε_ILF(x_t, t, c) - T_k)|^2, guidance's parts of the error added up as it adds them."""
        part, call = self.student.part, example.call
        with part.looping(call.step, self._past(example)):
            found = answer(self.student.denoiser, call.inputs, call.output.dtype)
        error = found.float() - example.target.to(found.device)
        steps, branches = (torch.full((example.images,), value) for value in (call.step, call.branch))
        given = error if self.guidance is None else self.guidance.combine(error, steps, branches)
        return example.weight * (given.square().mean() + RAW * error.square().mean())

    @torch.no_grad()
    def _past(self, example: Example) -> list[Computed]:
        """What the last looped block gave before, where a forecast of it is fed back."""
        if self.student.plan.source == "pass":
            return []
        return [self._feature(call) for call in example.past]

    def _feature(self, call: Call) -> Computed:
        student = self.student
        with student.part.looping(call.step):
            output = output_of(student.denoiser, student.plan.looped[-1], call.inputs, call.output.dtype)
        return computed(call.step, tensors(output))

    @torch.no_grad()
    def _evaluate(self, progress: Progress, loss: float) -> None:
        """Compare the moving average with the best so far, by whole sampling runs."""
        with self._averaged():
            better = progress.take(self.validation.error(self.student), loss)
            # The first is kept whatever it is, so that there is something to fall back on.
            if better or len(progress.history) == 1:
                write_tensors(self.best, self.parameters)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The student holds the moving average while the context lasts."""
        now = {name: own.detach().clone() for name, own in self.parameters.items()}
        with torch.no_grad():
            for name, own in self.parameters.items():
                own.copy_(self.average[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, own in self.parameters.items():
                    own.copy_(now[name])
