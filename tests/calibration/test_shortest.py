"""The fewest steps that a pipeline makes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import nn

from diffpress.calibration.conditions import Condition
from diffpress.calibration.sampling import Sampling, sample
from diffpress.calibration.shortest import shortest
from diffpress.export.errors import UnsupportedModelError


class Denoiser(nn.Module):
    """Is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, sample: Any, timestep: float) -> Any:
        """What is told the time step is a denoiser."""


class Pipeline:
    """Makes black images, in no fewer steps than told."""

    def __init__(self, least: int) -> None:
        self.unet, self.least, self.asked = Denoiser(), least, list[int]()

    def __call__(self, batch_size: int, generator: Any, num_inference_steps: int = 9, output_type: str = "np") -> Any:
        self.asked.append(num_inference_steps)
        if num_inference_steps < self.least:
            raise IndexError("too few")
        return SimpleNamespace(images=np.zeros((batch_size, 2, 2, 1), np.float32))


class Fixed:
    """Has steps of its own."""

    def __init__(self) -> None:
        self.unet = Denoiser()

    def __call__(self, batch_size: int, generator: Any, output_type: str = "np") -> Any:
        return SimpleNamespace(images=np.zeros((batch_size, 2, 2, 1), np.float32))


@pytest.mark.parametrize(
    ("least", "wanted", "expected"), [(0, 25, 2), (3, 25, 3), (5, 25, 6), (0, 2, 2), (5, 5, 5), (0, 1, 1)]
)
def test_as_few_steps_are_made_as_the_pipeline_makes(least: int, wanted: int, expected: int) -> None:
    pipeline = Pipeline(least)
    assert shortest(pipeline, Condition("", 0), Sampling(wanted, 3.0)) == Sampling(expected, 3.0)
    assert max(pipeline.asked, default=0) <= expected


@pytest.mark.parametrize("pipeline", [Pipeline(9), Fixed()], ids=["needs its own", "has its own"])
def test_where_no_fewer_are_made_the_pipelines_own_are(pipeline: Any) -> None:
    assert shortest(pipeline, Condition("", 0), Sampling()) == Sampling()


def test_a_number_of_steps_is_refused_where_the_pipeline_takes_none() -> None:
    assert sample(Fixed(), [Condition("", 0)], Sampling()).images.shape == (1, 1, 2, 2)
    with pytest.raises(UnsupportedModelError, match=r"Fixed has steps of its own: leave sampling\.steps"):
        sample(Fixed(), [Condition("", 0)], Sampling(4))
