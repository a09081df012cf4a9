"""Sampling by table: every linear scheduler, in four lines of numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .manifest import SchedulerTable

Floats = NDArray[np.float32]


def sample_by_table(noise: Floats, table: SchedulerTable, denoise: Callable[[Floats, float], Floats]) -> Floats:
    """Run the schedule: `denoise` gets the scaled sample and the time step, and gives the guided output."""
    terms = np.empty((len(table.timesteps) + 1, *noise.shape), np.float32)
    terms[0] = sample = noise * np.float32(table.init_noise_sigma)
    for call, (timestep, scale) in enumerate(zip(table.timesteps, table.input_scale, strict=True)):
        terms[call + 1] = denoise(sample * np.float32(scale), timestep)
        row = np.asarray(table.coefficients[call], np.float32)
        sample = np.tensordot(row, terms[: call + 2], axes=1)
    return sample
