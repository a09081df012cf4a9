"""The loop: learn from recorded calls, then from the student's own, judged by whole runs from noise held back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffpress.calibration.examples import Batch
from diffpress.calibration.guidance import Guidance
from diffpress.calibration.sampling import answer
from diffpress.export.errors import UserError

from ..options import Qalora
from .checkpoint import Progress, load_checkpoint, read_tensors, save_checkpoint, write_tensors
from .importance import StepImportance
from .lessons import Lessons, steps_together
from .optimizer import make_optimizer
from .student import Student

JUDGEMENTS = 12
"""How often, over the whole of it; each leaves a checkpoint."""
WARM_UP = 20
"""Iterations over which the learning rates rise."""
DECAY = 0.98
"""Of the moving average of everything learned, which is what is judged and kept."""
A_RATE = 0.1
"""Learning rate of A over that of B: A starts at full size, B at zero."""
ZERO_POINT_RATE = 10.0
"""Learning rate of zero points, counted in codes, over that of scales, counted in shares of themselves."""
BIAS_RATE = 0.05
"""Learning rate of biases over that of scales."""
RAW = 0.1
"""Weight of the squared error of every single output, beside that of what they add up to."""

Report = Callable[[int, int, float], None]
"""Called with how many iterations are done, how many there are, and the loss."""


class LearningError(UserError):
    """Learning left the numbers that a computer can hold."""


def learn(
    student: Student,
    lessons: Lessons,
    importance: StepImportance,
    guidance: Guidance | None,
    options: Qalora,
    folder: Path,
    report: Report | None = None,
) -> Progress:
    """Learn for `options.iterations`, or until what is held back stops getting better; the best ends up in `student`.

    He et al. 2024, arXiv 2310.03270, eq. 7, with the inputs of the teacher's runs and then of the student's own, and the
    errors of several steps added up before they are squared. Goes on from the checkpoint in `folder`. Raises LearningError
    naming the layer where the loss is not finite; the last checkpoint stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return _Learning(student, lessons, importance, guidance, options, folder).run(report)


@dataclass
class _Learning:
    student: Student
    lessons: Lessons
    importance: StepImportance
    guidance: Guidance | None
    options: Qalora
    folder: Path

    def __post_init__(self) -> None:
        self.parameters = self.student.parameters()
        groups = rate_groups(self.student, self.options)
        self.optimizer = make_optimizer(self.options.optimizer, groups, self.student.large)
        self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.file, self.best = self.folder / "learned.safetensors", self.folder / "best.safetensors"

    def run(self, report: Report | None) -> Progress:
        options = self.options
        progress = Progress()
        if self.best.exists():
            progress = load_checkpoint(self.file, self.parameters, self.average, self.optimizer)
        if progress.iteration == 0:
            # Where nothing gets better, what was started from is kept.
            self._judge(progress, self._first_loss())
        every = judge_every(options.iterations)
        own_from = round(options.iterations * (1 - options.own_trajectory))
        while progress.iteration < options.iterations and progress.since_best < options.patience:
            if options.own_trajectory and progress.iteration >= own_from:
                self.lessons.follow(self.student, (progress.iteration - own_from) // every)
            loss = self._iterate(progress.iteration)
            progress.iteration += 1
            if progress.iteration % every == 0 or progress.iteration == options.iterations:
                self._judge(progress, loss)
                save_checkpoint(self.file, self.parameters, self.average, self.optimizer, progress)
            if report is not None:
                report(progress.iteration, options.iterations, loss)
        read_tensors(self.best, self.parameters)
        return progress

    @torch.no_grad()
    def _first_loss(self) -> float:
        with self.student.on():
            return float(self._loss(self.lessons.batch(0, self.options.batch)))

    def _iterate(self, iteration: int) -> float:
        rate = _rate(iteration, self.options.iterations)
        for group, own in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = own * rate
        loss = 0.0
        size = math.ceil(self.options.batch / self.options.accumulate)
        for part in range(self.options.accumulate):
            batch = self.lessons.batch(iteration * self.options.accumulate + part, size)
            with self.student.on():
                found = self._loss(batch) / self.options.accumulate
                found.backward()
            loss += float(found.detach())
            if not math.isfinite(loss):
                raise LearningError(self._explain(batch, iteration))
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - DECAY)
        return loss

    def _loss(self, batch: Batch) -> Tensor:
        """What the errors of what the scheduler is given add up to, and a little of the denoiser's own error."""
        error = answer(self.student.denoiser, batch.inputs, batch.output.dtype) - batch.output.to(self.student.device)
        given = error if self.guidance is None else self.guidance.combine(error, batch.steps)
        # Where guidance is not known its parts stand for themselves.
        steps = batch.steps.repeat(len(given) // len(batch.steps))
        together = steps_together(len(batch.steps))
        return self.importance.accumulated(given, steps, together) + RAW * error.square().mean()

    @torch.no_grad()
    def _judge(self, progress: Progress, loss: float) -> None:
        """Compare the moving average with the best so far, by whole sampling runs."""
        _swap(self.parameters, self.average)
        judged = self.lessons.judge(self.student)
        progress.since_best += 1
        # The first is kept whatever it is, so that there is something to fall back on.
        if judged < progress.best or not progress.history:
            progress.best, progress.since_best = judged, 0
            write_tensors(self.best, self.parameters)
        _swap(self.parameters, self.average)
        progress.history.append({"iteration": progress.iteration, "loss": loss, "held_back": judged})

    @torch.no_grad()
    def _explain(self, batch: Batch, iteration: int) -> str:
        """Which layer is the first that gives something not finite."""
        bad: list[str] = []

        def look(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            return lambda _layer, _inputs, output: None if bad or output.isfinite().all() else bad.append(name)

        handles = [
            self.student.denoiser.get_submodule(name).register_forward_hook(look(name)) for name in self.student.layers
        ]
        try:
            with self.student.on():
                self._loss(batch)
        finally:
            for handle in handles:
                handle.remove()
        where = f"layer {bad[0]} is the first whose output is not finite" if bad else "every layer's output is finite"
        return (
            f"quantize: the loss is not finite after {iteration} iterations; {where}. The last checkpoint is kept. "
            "Lower quantize.lora_rate or quantize.scale_rate, or list the layer under quantize.keep."
        )


def rate_groups(student: Student, options: Qalora) -> list[dict[str, Any]]:
    """What is learned at which rate: low-rank changes, step sizes, zero points, biases."""
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in student.parameters().items():
        groups.setdefault(name.rpartition(".")[2], []).append(parameter)
    scale = options.scale_rate
    rates = {
        "a": A_RATE * options.lora_rate,
        "b": options.lora_rate,
        "log_weight_scale": scale,
        "log_activation_scale": scale,
        "zero_point": ZERO_POINT_RATE * scale,
        "bias": BIAS_RATE * scale,
    }
    return [{"params": parameters, "lr": rates[kind]} for kind, parameters in sorted(groups.items())]


def judge_every(iterations: int) -> int:
    """Iterations from one judgement, and one round of own runs, to the next."""
    return max(1, iterations // JUDGEMENTS)


def _rate(iteration: int, iterations: int) -> float:
    """Up at first, then down to zero in a straight line."""
    return min(1.0, (iteration + 1) / WARM_UP) * (1 - iteration / iterations)


def _swap(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    """Exchange what both hold, without copying it."""
    for name, parameter in parameters.items():
        parameter.data, values[name] = values[name], parameter.data
