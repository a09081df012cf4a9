"""What feedback learns from: the teacher's recorded runs, and the student's own with the teacher's answers to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffpress.calibration.conditions import Condition
from diffpress.calibration.sampling import Call, Sampling
from diffpress.calibration.trajectory import Trajectories
from diffpress.export.errors import UnsupportedModelError
from diffpress.export.runtime.feedback import PAST

from ...rollouts import ROLLOUT_ROUNDS, TEACHERS_SHARE, forget_rounds, record_round
from .landing import Landing, targets
from .student import Student


@dataclass(frozen=True)
class StudentRollouts:
    """How the student's own runs are sampled."""

    pipeline: Any
    wanted: Sequence[Condition]
    """As many different ones as there are; they are taken in turn."""
    sampling: Sampling
    folder: Path
    batch: int
    """Images that are sampled at a time."""


class Example(NamedTuple):
    """One recorded call of B images, and what its answer has to be."""

    call: Call
    target: Tensor
    """[parts * B, ...]"""
    weight: float
    """Of a squared error of the answer, over those at other steps."""
    images: int
    past: list[Call]
    """At the steps before it that were not held, the latest first."""


class TrainingData:
    """An example for every number, the same again when learning goes on after it was killed."""

    def __init__(
        self, recorded: Trajectories, runs: StudentRollouts, landed: Sequence[Landing], looped: Sequence[int], seed: int
    ) -> None:
        """Of the steps `looped`, which some of what is `landed` is about."""
        self.recorded, self.runs, self.seed = recorded, runs, seed
        self.landed, self.looped = {own.step: own for own in landed}, list(looped)
        self.weights = step_weights({step: self.landed[step].weight for step in looped})
        self.rounds: dict[int, Trajectories] = {}

    def example(self, number: int) -> Example:
        """Of the teacher's runs and, once there are some, mostly of the student's own."""
        generator = torch.Generator().manual_seed(self.seed + number)
        pool = self.recorded
        if self.rounds and number % TEACHERS_SHARE:
            pool = _drawn(list(self.rounds.values()), generator)
        shard, step = _drawn(pool.shards, generator), _drawn(self.looped, generator)
        return self._of(pool, shard, step, generator)

    def _of(self, pool: Trajectories, shard: Path, step: int, generator: torch.Generator) -> Example:
        calls = calls_by_step(pool.steps(shard))
        branch = int(torch.randint(len(calls[step]), (), generator=generator))
        before = [own for own in self.landed.values() if own.step <= step]
        needed = {j: pool.call(shard, calls[j][branch]) for own in before for j in own.shares}
        target = targets(before, {j: call.output.float() for j, call in needed.items()})[step]
        past = [needed[own.step] for own in before[:-1][::-1][:PAST]]
        return Example(needed[step], target, self.weights[step], pool.images(shard), past)

    def follow(self, student: Student, latest: int) -> None:
        """Have the rounds up to `latest` that are learned from; those that are on disk already are not sampled again."""
        wanted = range(max(0, latest - ROLLOUT_ROUNDS + 1), latest + 1)
        self.rounds = {
            index: self.rounds.get(index) or record_round(self.runs, student, index, self.runs.batch)
            for index in wanted
        }

    def forget(self, latest: int) -> None:
        """Delete the rounds that are learned from no more once the latest is `latest`."""
        forget_rounds(self.runs.folder, latest, ROLLOUT_ROUNDS)


def step_weights(landed: Mapping[int, float]) -> dict[int, float]:
    """Of squared errors at steps whose errors have these weights in the last sample; one on average."""
    mean = sum(weight**2 for weight in landed.values()) / max(1, len(landed))
    return {step: weight**2 / mean for step, weight in landed.items()}


def calls_by_step(steps: Sequence[int]) -> Mapping[int, list[int]]:
    """Which calls each step makes, `steps` being that of every call."""
    found: dict[int, list[int]] = {}
    for index, step in enumerate(steps):
        found.setdefault(step, []).append(index)
    return found


def check_calls(trajectories: Trajectories) -> None:
    """Raises UnsupportedModelError where some steps make more calls of the denoiser than others: they answer for each other."""
    for shard in trajectories.shards:
        counts = {len(calls) for calls in calls_by_step(trajectories.steps(shard)).values()}
        if len(counts) > 1:
            raise UnsupportedModelError(
                f"steps.method feedback lets a call stand for those of later steps, but this pipeline makes between "
                f"{min(counts)} and {max(counts)} calls a step. Take the method inherit."
            )


def products_of(trajectories: Trajectories) -> Tensor:
    """[S, S] products of the teacher's answers at steps with each other, over all recorded runs."""
    steps = len(trajectories.timesteps)
    products = torch.zeros(steps, steps, dtype=torch.double)
    for shard in trajectories.shards:
        calls = calls_by_step(trajectories.steps(shard))
        for branch in range(len(calls[0])):
            answers = [trajectories.call(shard, calls[step][branch]).output.flatten().double() for step in range(steps)]
            products += torch.stack([torch.stack([a @ b for b in answers]) for a in answers])
    return products


def _drawn(values: Sequence[Any], generator: torch.Generator) -> Any:
    return values[int(torch.randint(len(values), (), generator=generator))]
