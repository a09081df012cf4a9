"""Rounds of a student's own runs, answered by the teacher: what every method that learns on what it samples shares."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from diffpress.calibration.conditions import Condition
from diffpress.calibration.sampling import Call, Sampling, replay
from diffpress.calibration.trajectory import Trajectories, record

ROLLOUT_ROUNDS = 8
"""Rounds that are learned from; older ones show a student that is no more."""
TEACHERS_SHARE = 4
"""Every so many batches are of the teacher's runs while the student's own are learned from."""


class Student(Protocol):
    """One copy of the weights, with what is learned laid over it or taken off."""

    denoiser: nn.Module

    def on(self) -> AbstractContextManager[None]:
        """The student answers."""

    def off(self) -> AbstractContextManager[None]:
        """The teacher answers."""


class Rollouts(Protocol):
    """How a student's own runs are sampled."""

    @property
    def pipeline(self) -> Any:
        """Whose denoiser learns."""

    @property
    def wanted(self) -> Sequence[Condition]:
        """As many different ones as there are; they are taken in turn."""

    @property
    def sampling(self) -> Sampling:
        """As the pipeline is recorded."""

    @property
    def folder(self) -> Path:
        """Where rounds are kept."""

    @property
    def batch(self) -> int:
        """Images that are sampled at a time."""


def record_round(runs: Rollouts, student: Student, index: int, images: int) -> Trajectories:
    """Let the student sample round `index`, of so many images, and the teacher answer to what it saw."""
    first = index * images
    wanted = [runs.wanted[place % len(runs.wanted)] for place in range(first, first + images)]

    def teacher(call: Call) -> Tensor:
        with student.off():
            return replay(student.denoiser, call)

    with student.on():
        folder = runs.folder / f"round-{index:05d}"
        return record(runs.pipeline, wanted, runs.sampling, folder, runs.batch, answer=teacher)


def forget_rounds(folder: Path, latest: int, kept: int) -> None:
    """Delete all but the `kept` rounds that end with the `latest`."""
    for own in folder.glob("round-*"):
        if int(own.name.removeprefix("round-")) <= latest - kept:
            shutil.rmtree(own)
