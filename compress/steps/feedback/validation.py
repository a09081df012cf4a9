"""What plans and learning are judged by: whole runs from noise that nothing is learned from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from diffpress.calibration.conditions import Condition
from diffpress.calibration.metrics import geometric_mean_error
from diffpress.calibration.sampling import Sampling, sample_in_batches

from .student import Student

SMALLEST = 1e-12
"""Mean squared error that counts as none."""


class Validation:
    """The teacher's runs are made once, when they are needed."""

    def __init__(self, pipeline: Any, images: Sequence[Condition], sampling: Sampling, batch: int) -> None:
        self.pipeline, self.images, self.sampling, self.batch = pipeline, images, sampling, batch
        self._truth: Tensor | None = None

    def error(self, student: Student) -> float:
        """Squared error of the latents that whole runs of the student end in.

        The geometric mean over images, as a mean of decibels is, so that no single image decides.
        """
        if self._truth is None:
            with student.off():
                self._truth = self._latents()
        with student.on():
            return geometric_mean_error(self._latents(), self._truth, SMALLEST)

    def _latents(self) -> Tensor:
        return sample_in_batches(self.pipeline, self.images, self.sampling, self.batch).latents
