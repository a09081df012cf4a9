"""What the student learns from: the teacher's recorded runs, and its own runs with the teacher's answers to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffpress.calibration.conditions import Condition
from diffpress.calibration.examples import Batch, Examples
from diffpress.calibration.metrics import geometric_mean_error
from diffpress.calibration.sampling import Sampling, sample_in_batches
from diffpress.calibration.trajectory import Trajectories

from ..options import Qalora
from ..rollouts import ROLLOUT_ROUNDS, TEACHERS_SHARE, forget_rounds, record_round
from .student import Student

STEPS_PER_IMAGE = 4
"""Steps of one image that a batch holds, so that it shows what their errors add up to."""
FRESH_SHARE = 0.5
"""Examples that a round of the student's own runs makes, over those that are drawn until the next."""


@dataclass(frozen=True)
class StudentRollouts:
    """How the student's own runs are sampled."""

    pipeline: Any
    wanted: Sequence[Condition]
    """As many different ones as there are; they are taken in turn."""
    validation_images: Sequence[Condition]
    """What learning is evaluated by, and nothing else."""
    sampling: Sampling
    folder: Path
    batch: int = 4
    """Images that are sampled at a time."""


class TrainingData:
    """A batch for every iteration, the same again when learning goes on after it was killed."""

    def __init__(
        self, recorded: Trajectories, runs: StudentRollouts, sampling_probabilities: Tensor, seed: int, images: int
    ) -> None:
        """`sampling_probabilities` [S]: how often each step is drawn; `images`: of one round of rollouts."""
        self.recorded = Examples(recorded, recorded.shards)
        self.runs, self.sampling_probabilities, self.seed, self.images = runs, sampling_probabilities, seed, images
        self.rollouts: dict[int, Examples] = {}
        self._truth: Tensor | None = None

    def batch(self, number: int, size: int) -> Batch:
        """Calls drawn from the teacher's runs and, once there are some, mostly from the student's own.

        Every `steps_per_image(size)` of them are of one image.
        """
        generator = torch.Generator().manual_seed(self.seed + number)
        pool = self.recorded
        if self.rollouts and number % TEACHERS_SHARE:
            rounds = list(self.rollouts.values())
            pool = rounds[int(torch.randint(len(rounds), (), generator=generator))]
        together, drawn = steps_per_image(size), []
        runs = self._of_one_form(pool, generator)
        for image in torch.randint(len(runs), (size // together,), generator=generator).tolist():
            run = runs[image]
            places = torch.multinomial(
                self.sampling_probabilities[pool.steps[run]], together, True, generator=generator
            )
            drawn += [run[place] for place in places.tolist()]
        return pool.batch(drawn)

    def _of_one_form(self, pool: Examples, generator: torch.Generator) -> list[list[int]]:
        """The examples of each image that have one form, drawn by how often its examples are."""
        if len(pool.runs) == 1:
            return pool.runs[0]
        steps = [pool.steps[list(chain(*runs))] for runs in pool.runs]
        shares = torch.stack([self.sampling_probabilities[own].sum() for own in steps])
        return pool.runs[int(torch.multinomial(shares, 1, generator=generator))]

    def evaluate(self, student: Student) -> float:
        """Squared error of the latents that whole runs of the student end in, from noise it never learned from.

        The geometric mean over images, as a mean of decibels is, so that no single image decides.
        """
        if self._truth is None:
            with student.off():
                self._truth = self._validation_latents()
        with student.on():
            return geometric_mean_error(self._validation_latents(), self._truth)

    def _validation_latents(self) -> Tensor:
        runs = self.runs
        return sample_in_batches(runs.pipeline, runs.validation_images, runs.sampling, runs.batch).latents

    def follow(self, student: Student, latest: int) -> None:
        """Have the rounds up to `latest` that are learned from; those that are on disk already are not sampled again."""
        wanted = range(max(0, latest - ROLLOUT_ROUNDS + 1), latest + 1)
        self.rollouts = {index: self.rollouts.get(index) or self._sample(student, index) for index in wanted}

    def forget(self, latest: int) -> None:
        """Delete the rounds that are learned from no more once the latest is `latest`, however often learning goes on."""
        forget_rounds(self.runs.folder, latest, ROLLOUT_ROUNDS)

    def _sample(self, student: Student, index: int) -> Examples:
        """Let the student sample, and the teacher answer to what it saw."""
        trajectories = record_round(self.runs, student, index, self.images)
        return Examples(trajectories, trajectories.shards)


def steps_per_image(size: int) -> int:
    """How many of a batch of `size` are of one image."""
    return next(count for count in range(min(STEPS_PER_IMAGE, size), 0, -1) if size % count == 0)


def rollout_bytes(options: Qalora, every: int, steps: int, run_bytes: int) -> int:
    """Most disk that the rounds take where a new one begins `every` so many iterations and one run takes `run_bytes`.

    Old rounds are deleted once a checkpoint needs them no more, when the next has been sampled already.
    """
    rounds = min(ROLLOUT_ROUNDS + 1, ceil(options.iterations * options.rollout_share / every))
    return rounds * images_per_round(every, options.batch, steps) * run_bytes


def images_per_round(iterations: int, batch: int, steps: int) -> int:
    """Images that a round of own runs makes where `iterations` batches are drawn until the next."""
    return max(1, round(iterations * batch / steps * FRESH_SHARE))
