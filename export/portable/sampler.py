"""Sampling by table: every linear scheduler in four lines of numpy, and those that draw noise or clip in a few more."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .manifest import Operation, SchedulerTable

Floats = NDArray[np.float32]
Denoise = Callable[[Floats, float], Floats]


def sample_by_table(noise: Floats, table: SchedulerTable, denoise: Denoise, draw: Callable[[], Floats]) -> Floats:
    """Run the schedule: `denoise` gets the scaled sample and the time step, and gives the guided output; `draw` gives more
    noise of the same shape.
    """
    if table.updates is not None:
        return _by_updates(noise, table, table.updates, denoise, draw)
    terms = np.empty((len(table.timesteps) + 1, *noise.shape), np.float32)
    terms[0] = sample = noise * np.float32(table.init_noise_sigma)
    for call, (timestep, scale) in enumerate(zip(table.timesteps, table.input_scale, strict=True)):
        terms[call + 1] = denoise(sample * np.float32(scale), timestep)
        row = np.asarray(table.coefficients[call], np.float32)
        sample = np.tensordot(row, terms[: call + 2], axes=1)
    return sample


def _by_updates(
    noise: Floats,
    table: SchedulerTable,
    updates: tuple[tuple[Operation, ...], ...],
    denoise: Denoise,
    draw: Callable[[], Floats],
) -> Floats:
    """Terms are kept as long as a later operation takes them up."""
    last_use = {term: place for place, own in _numbered(updates) for term, _ in own.weights or ()}
    sample = noise * np.float32(table.init_noise_sigma)
    terms, count = {0: sample}, 1
    for timestep, scale, update in zip(table.timesteps, table.input_scale, updates, strict=True):
        terms[count] = denoise(sample * np.float32(scale), timestep)
        count += 1
        for own in update:
            terms[count] = draw() if own.weights is None else _sum(own, terms)
            sample = terms[count]
            terms = {term: value for term, value in terms.items() if last_use.get(term, 0) > count}
            count += 1
    return sample


def _numbered(updates: tuple[tuple[Operation, ...], ...]) -> list[tuple[int, Operation]]:
    """Every operation with the number of the term that it gives."""
    numbered, count = [], 1
    for update in updates:
        numbered += [(count + 1 + place, own) for place, own in enumerate(update)]
        count += 1 + len(update)
    return numbered


def _sum(own: Operation, terms: dict[int, Floats]) -> Floats:
    total = sum(np.float32(weight) * terms[term] for term, weight in own.weights or ())
    limited = own.low is not None or own.high is not None
    return np.clip(total, own.low, own.high).astype(np.float32) if limited else np.asarray(total, np.float32)
