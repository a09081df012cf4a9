"""One block after the other: each learns to answer as the teacher's does, from what the student so far feeds it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffpress.calibration.examples import Batch
from diffpress.calibration.partway import arguments_of, call_order, output_of

from ..checkpoint import Progress, read_progress, read_tensors, write_tensors
from ..importance import StepImportance
from ..options import Qalora
from .layer import along_batch
from .student import Student
from .train import Report
from .trainer import Trainer
from .training_data import TrainingData

STEPS = 4
"""Steps of a block that take the time of one of the whole: on average half of two calls, and nothing on the way back."""


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the repeated modules of `model`: transformer blocks, residual blocks, attentions.

    A block is a member of a ModuleList with two layers or more, that holds no two blocks itself. None holds another.
    """
    return list(_blocks(model, "", False))


def _blocks(module: nn.Module, name: str, member: bool) -> Iterator[str]:
    listed = isinstance(module, nn.ModuleList)
    children = {f"{name}.{key}" if name else key: child for key, child in module.named_children()}
    inner = [block for key, child in children.items() for block in _blocks(child, key, listed)]
    layers = sum(isinstance(part, (nn.Linear, nn.Conv2d)) for part in module.modules())
    yield from [name] if member and layers > 1 and len(inner) < 2 else inner


def learn_blocks(
    student: Student,
    training_data: TrainingData,
    importance: StepImportance,
    options: Qalora,
    folder: Path,
    report: Report | None = None,
) -> Progress:
    """Learn block by block in the order in which they are called; layers outside of blocks stay as they started.

    Li et al. 2021, arXiv 2102.05426, without its Hessian: the squared error of what a block answers, on recorded calls, with
    steps weighted as the scheduler weights them. Gradients, the optimizer and activations are of one block at a time. A
    block that makes whole runs from held-out noise worse is put back. Blocks in `folder` that were learned already are read
    from there. Raises LearningError naming the layer where the loss is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return _Blocks(student, training_data, importance, options, folder).run(report)


@dataclass
class _Blocks:
    student: Student
    training_data: TrainingData
    importance: StepImportance
    options: Qalora
    folder: Path

    def run(self, report: Report | None) -> Progress:
        progress = Progress()
        names = self._in_call_order()
        steps = block_steps(self.options.iterations, len(names))
        for index, name in enumerate(names):
            file = self.folder / f"block-{index:05d}.safetensors"
            known = read_progress(file)
            if known is None:
                self._learn(name, steps, steps * len(names), progress, file, report)
            else:
                progress = known
            read_tensors(file, self._parameters(name))
        return progress

    def _in_call_order(self) -> list[str]:
        first = self.training_data.recorded.batch([0])
        names = [name for name in find_blocks(self.student.denoiser) if self._parameters(name)]
        return call_order(self.student.denoiser, names, first.inputs, first.output.dtype)

    def _parameters(self, name: str) -> dict[str, nn.Parameter]:
        return {key: own for key, own in self.student.parameters().items() if key.startswith(f"{name}.")}

    def _learn(self, name: str, steps: int, total: int, progress: Progress, file: Path, report: Report | None) -> None:
        """Learn one block, and write down what is kept of it."""
        parameters = self._parameters(name)
        start = {key: value.detach().clone() for key, value in parameters.items()}
        trainer = Trainer(
            self.student, parameters, self.training_data, self.options, lambda batch: self._loss(name, batch)
        )
        first = progress.iteration
        if not progress.history:
            progress.take(self.training_data.evaluate(self.student), trainer.first_loss(0))
        for step in range(steps):
            loss = trainer.step(step, steps, first)
            progress.iteration += 1
            if report is not None:
                report(progress.iteration, total, loss)
        with trainer.averaged():
            better = progress.take(self.training_data.evaluate(self.student), loss)
            write_tensors(file, parameters if better else start, progress.metadata())

    def _loss(self, name: str, batch: Batch) -> Tensor:
        """Squared error of what the block answers; nothing behind it is called."""
        denoiser, inputs, dtype = self.student.denoiser, batch.inputs, batch.output.dtype
        with torch.no_grad():
            with self.student.off():
                wanted = tensors(output_of(denoiser, name, inputs, dtype))
            seen = arguments_of(denoiser, name, inputs, dtype)
        found = tensors(denoiser.get_submodule(name)(*seen.positional, **seen.named))
        parts = len(batch.output) // len(batch.steps)
        weights = self.importance.weights[batch.steps].square().repeat(parts).to(self.student.device)
        errors = [(own.float() - other.float()).square() for own, other in zip(found, wanted, strict=True)]
        return torch.stack([(error * along_batch(weights, error)).mean() for error in errors]).sum()


def block_steps(iterations: int, blocks: int) -> int:
    """Steps that each of so many blocks learns for, so that all of them take as long as `iterations` of the whole."""
    return max(1, round(STEPS * iterations / max(1, blocks)))


def tensors(output: Any) -> list[Tensor]:
    """All tensors of floats in what a module answers."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors(part)]
