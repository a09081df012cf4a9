"""Down a loss step by step: rates, the moving average, and which layer is to blame where the loss is no number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffpress.calibration.examples import Batch
from diffpress.export.errors import LearningError

from ..options import Qalora
from .optimizer import make_optimizer
from .student import Student
from .training_data import TrainingData

WARM_UP = 20
"""Iterations over which the learning rates rise."""
DECAY = 0.98
"""Of the moving average of everything learned, which is what is evaluated and kept."""
A_RATE = 0.1
"""Learning rate of A over that of B: A starts at full size, B at zero."""
ZERO_POINT_RATE = 10.0
"""Learning rate of zero points, counted in codes, over that of scales, counted in shares of themselves."""
BIAS_RATE = 0.05
"""Learning rate of biases over that of scales."""

Loss = Callable[[Batch], Tensor]


class Trainer:
    """Learns `parameters` of the student, by batches out of its training_data."""

    def __init__(
        self,
        student: Student,
        parameters: dict[str, nn.Parameter],
        training_data: TrainingData,
        options: Qalora,
        loss: Loss,
    ) -> None:
        """`loss` is asked while the student is on."""
        self.student, self.parameters, self.training_data = student, parameters, training_data
        self.options, self.loss = options, loss
        self.optimizer = make_optimizer(options.optimizer, rate_groups(parameters, options), student.large)
        self.average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    @torch.no_grad()
    def first_loss(self, number: int) -> float:
        """The loss of the batch of this number."""
        with self.student.on():
            return float(self.loss(self.training_data.batch(number, self.options.batch)))

    def step(self, iteration: int, iterations: int, first: int = 0) -> float:
        """The loss of one of `iterations` steps; batches are those drawn as iteration `first + iteration`.

        Raises LearningError where the loss is not finite.
        """
        rate = _rate(iteration, iterations)
        for group, own in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = own * rate
        loss = 0.0
        for batch in self._batches(first + iteration):
            with self.student.on():
                found = self.loss(batch) * (len(batch.steps) / self.options.batch)
                found.backward()
            loss += float(found.detach())
            if not math.isfinite(loss):
                raise LearningError(self._explain(batch, first + iteration))
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - DECAY)
        return loss

    def _batches(self, iteration: int) -> Iterable[Batch]:
        options = self.options
        for part, size in enumerate(part_sizes(options.batch, options.accumulate)):
            yield self.training_data.batch(iteration * options.accumulate + part, size)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The student holds the moving average while the context lasts."""
        _swap(self.parameters, self.average)
        try:
            yield
        finally:
            _swap(self.parameters, self.average)

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
                self.loss(batch)
        finally:
            for handle in handles:
                handle.remove()
        where = f"layer {bad[0]} is the first whose output is not finite" if bad else "every layer's output is finite"
        return (
            f"quantize: the loss is not finite after {iteration} iterations; {where}. The last checkpoint is kept. "
            "Lower quantize.lora_rate or quantize.scale_rate, or list the layer under quantize.keep."
        )


def part_sizes(batch: int, parts: int) -> list[int]:
    """Sizes of the parts that a batch is computed in: as even as can be, none empty."""
    return [len(range(part, batch, parts)) for part in range(min(parts, batch))]


def rate_groups(parameters: Mapping[str, nn.Parameter], options: Qalora) -> list[dict[str, Any]]:
    """What is learned at which rate: low-rank changes, step sizes, zero points, biases."""
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
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


def _rate(iteration: int, iterations: int) -> float:
    """Up at first, then down to zero in a straight line."""
    return min(1.0, (iteration + 1) / WARM_UP) * (1 - iteration / iterations)


def _swap(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    """Exchange what both hold, without copying it."""
    for name, parameter in parameters.items():
        parameter.data, values[name] = values[name], parameter.data
