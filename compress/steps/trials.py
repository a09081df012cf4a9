"""Whole runs with a plan, beside the same runs without: how far the images are apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from diffpress.calibration.conditions import Condition
from diffpress.calibration.metrics import geometric_mean_error
from diffpress.calibration.sampling import sample_in_batches
from diffpress.export.runtime import Inheritance, StepClock, StepPlan, Unit

from ..overlay import overlaid
from ..stage import Subject
from .candidates import Candidate, Forecasting
from .forecasts import Forecasts

SMALLEST = 1e-12
"""Mean squared error that counts as none."""


class Fitted(NamedTuple):
    """A plan with its numbers."""

    plan: StepPlan
    damping: Tensor
    correction: Tensor | None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """As the runtime part holds them."""
        corrected = {} if self.correction is None else {"correction": self.correction}
        return {"damping": self.damping, **corrected}


def fit(units: Sequence[Unit], forecasts: Forecasts, own: Candidate, storage: str) -> Fitted:
    """The numbers of a candidate in closed form."""
    order, corrected, trust = own.forecast
    damping, correction = forecasts.of_plan(own.cells, order, corrected)
    damping[..., :1] += trust * (1 - damping[..., :1])
    plan = StepPlan.of(units, own.cells, order=order, corrected=corrected, storage=storage)
    return Fitted(plan, damping, correction[plan.inheriting].half() if corrected else None)


def sampled(subject: Subject, wanted: Sequence[Condition], fitted: Fitted) -> Tensor:
    """Images [N, C, H, W] of runs with a plan."""
    clock = StepClock(subject.timesteps)
    part = Inheritance(fitted.plan, clock)
    part.load_state_dict(fitted.tensors)
    with overlaid(subject.model, part.wraps(subject.model), clock):
        return sample_in_batches(subject.pipeline, wanted, subject.sampling, subject.batch).images


@dataclass
class Trials:
    """Errors of candidates; what was tried before a run was killed is read from `path`."""

    path: Path
    fitted: Callable[[Candidate], Fitted]
    run: Callable[[Fitted], Tensor]
    target: Callable[[], Tensor]
    """The images without a plan, made when they are needed."""
    _target: Tensor | None = None

    def __post_init__(self) -> None:
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self._known: dict[Candidate, float] = {}
        for line in lines:
            rows, forecast, error = json.loads(line)
            self._known[Candidate(tuple(rows), Forecasting(*forecast))] = error

    def error(self, own: Candidate) -> float:
        """Of the images that it makes: see `image_error`."""
        if own not in self._known:
            self._known[own] = self._tried(own)
        return self._known[own]

    def _tried(self, own: Candidate) -> float:
        if self._target is None:
            self._target = self.target()
        error = image_error(self.run(self.fitted(own)), self._target)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([own.rows, own.forecast, error]) + "\n")
        return error


def image_error(found: Tensor, expected: Tensor) -> float:
    """Geometric mean over images [N, ...] in 0..1 of their mean squared difference, as decibels are averaged.

    Latents would not do: some of their errors are not seen in any image.
    """
    error = geometric_mean_error(found, expected, SMALLEST)
    return error if isfinite(error) else inf
