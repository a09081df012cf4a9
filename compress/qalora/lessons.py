"""What the student learns from: the teacher's recorded runs, and its own runs with the teacher's answers to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffpress.calibration.conditions import Condition
from diffpress.calibration.examples import Batch, Examples
from diffpress.calibration.sampling import Call, Sampling, replay, sample_in_batches
from diffpress.calibration.trajectory import Trajectories, record

from .student import Student

STEPS_TOGETHER = 4
"""Steps of one picture that a batch holds, so that it shows what their errors add up to."""
FRESH_SHARE = 0.5
"""Examples that a round of the student's own runs makes, over those that are drawn until the next."""
OWN_ROUNDS = 8
"""Rounds that are learned from; older ones show a student that is no more."""
TEACHERS_SHARE = 4
"""Every so many batches are of the teacher's runs while the student's own are learned from."""


@dataclass(frozen=True)
class OwnRuns:
    """How the student's own runs are sampled."""

    pipeline: Any
    wanted: Sequence[Condition]
    """As many different ones as there are; they are taken in turn."""
    held_back: Sequence[Condition]
    """What learning is judged by, and nothing else."""
    sampling: Sampling
    folder: Path
    batch: int = 4
    """Pictures that are sampled at a time."""


class Lessons:
    """A batch for every iteration, the same again when learning goes on after it was killed."""

    def __init__(self, recorded: Trajectories, runs: OwnRuns, chances: Tensor, seed: int, pictures: int) -> None:
        """`chances` [S]: how often each step is drawn, in proportion; `pictures` that a round of own runs makes."""
        self.recorded = Examples(recorded, recorded.shards)
        self.runs, self.chances, self.seed, self.pictures = runs, chances, seed, pictures
        self.own: dict[int, Examples] = {}
        self._truth: Tensor | None = None

    def batch(self, number: int, size: int) -> Batch:
        """Calls drawn from the teacher's runs and, once there are some, mostly from the student's own.

        Every `steps_together(size)` of them are of one picture.
        """
        generator = torch.Generator().manual_seed(self.seed + number)
        pool = self.recorded
        if self.own and number % TEACHERS_SHARE:
            rounds = list(self.own.values())
            pool = rounds[int(torch.randint(len(rounds), (), generator=generator))]
        together, drawn = steps_together(size), []
        for picture in torch.randint(len(pool.runs), (size // together,), generator=generator).tolist():
            run = pool.runs[picture]
            places = torch.multinomial(self.chances[pool.steps[run]], together, True, generator=generator)
            drawn += [run[place] for place in places.tolist()]
        return pool.batch(drawn)

    def judge(self, student: Student) -> float:
        """Squared error of the latents that whole runs of the student end in, from noise it never learned from.

        The geometric mean over pictures, as a mean of decibels is, so that no single picture decides.
        """
        if self._truth is None:
            with student.off():
                self._truth = self._held_back_latents()
        with student.on():
            errors = (self._held_back_latents() - self._truth).square().flatten(1).mean(1)
        return float(errors.log().mean().exp())

    def _held_back_latents(self) -> Tensor:
        runs = self.runs
        return sample_in_batches(runs.pipeline, runs.held_back, runs.sampling, runs.batch).latents

    def follow(self, student: Student, latest: int) -> None:
        """Have the rounds up to `latest` that are learned from; those that are on disk already are not sampled again."""
        wanted = range(max(0, latest - OWN_ROUNDS + 1), latest + 1)
        self.own = {index: self.own.get(index) or self._sample(student, index) for index in wanted}

    def _sample(self, student: Student, index: int) -> Examples:
        """Let the student sample, and the teacher answer to what it saw."""
        runs = self.runs
        first = index * self.pictures
        wanted = [runs.wanted[place % len(runs.wanted)] for place in range(first, first + self.pictures)]

        def teacher(call: Call) -> Tensor:
            with student.off():
                return replay(student.denoiser, call)

        with student.on():
            folder = runs.folder / f"round-{index:05d}"
            trajectories = record(runs.pipeline, wanted, runs.sampling, folder, runs.batch, answer=teacher)
        return Examples(trajectories, trajectories.shards)


def steps_together(size: int) -> int:
    """How many of a batch of `size` are of one picture."""
    return next(count for count in range(min(STEPS_TOGETHER, size), 0, -1) if size % count == 0)


def pictures_a_round(iterations: int, batch: int, steps: int) -> int:
    """Pictures that a round of own runs makes where `iterations` batches are drawn until the next."""
    return max(1, round(iterations * batch / steps * FRESH_SHARE))
