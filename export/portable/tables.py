"""Schedulers as tables: run the real one once on a basis, and its whole sampling run is a matrix, or a list of updates."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from .manifest import SchedulerTable
from .updates import is_linear, probe_updates, step_extras, trace_updates

STANDARD_STEPS = (10, 15, 20, 25, 30, 50)
PROBE_SPREAD = 3.0
"""Standard deviation of probing numbers: enough to meet every clipping that sampling would meet."""
TOLERANCE = 1e-4
"""Relative to the largest value of the run; schedulers compute in float32."""


class _NoSuchStepsError(UnsupportedModelError):
    """The scheduler does not make so many steps."""


def build_tables(
    scheduler: Any, wanted: int, others: Iterable[int], scales_input: bool, seeded: bool = True
) -> dict[int, SchedulerTable]:
    """Tables for `wanted` steps and for those of `others` that the scheduler has.

    Raises UnsupportedModelError where no table holds what the scheduler does, or it has no `wanted` steps. The pipeline asks
    the scheduler to scale noise and inputs if it `scales_input`, and hands its generator on to it if it is `seeded`.
    """
    tables = {wanted: build_table(scheduler, wanted, scales_input, seeded)}
    most = getattr(scheduler.config, "num_train_timesteps", wanted)
    for steps in others:
        if steps not in tables and steps <= most:
            with suppress(_NoSuchStepsError):
                tables[steps] = build_table(scheduler, steps, scales_input, seeded)
    return tables


def build_table(scheduler: Any, steps: int, scales_input: bool = True, seeded: bool = True) -> SchedulerTable:
    """The table for `steps` steps (see `build_tables`)."""
    if getattr(scheduler.config, "thresholding", False):
        raise UnsupportedModelError(
            f"{type(scheduler).__name__} has thresholding=True, which looks at all pixels at once, and an export samples by "
            "table: in the pipeline's folder, before it is compressed, set thresholding to false in "
            "scheduler/scheduler_config.json (an artifact's files are under digests: compress it anew)."
        )
    scheduler = copy.deepcopy(scheduler)
    try:
        scheduler.set_timesteps(steps)
        table = _table_with_updates(scheduler, seeded)
    except (ValueError, NotImplementedError) as error:
        raise _NoSuchStepsError(
            f"{type(scheduler).__name__} cannot make {steps} steps: {error} Take other `sampling.steps`."
        ) from error
    if not scales_input:
        _check_unscaled(scheduler, table)
    return table


def _table_with_updates(scheduler: Any, seeded: bool) -> SchedulerTable:
    """The table of a scheduler that is linear, or of its updates where it draws noise or clips."""
    table = trace_updates(copy.deepcopy(scheduler), seeded)
    if is_linear(table):
        return table_of(scheduler, seeded)
    error = max(probe_updates(copy.deepcopy(scheduler), table, seeded, seed, PROBE_SPREAD) for seed in (0, 1))
    if not error < TOLERANCE:
        raise UnsupportedModelError(_why_not_linear(scheduler, error))
    return table


def table_of(scheduler: Any, seeded: bool = True) -> SchedulerTable:
    """The table of a scheduler whose steps are set, probed against a run on random numbers; it stays as it is.

    Raises UnsupportedModelError where it is not linear, and what the scheduler itself raises where it cannot run.
    """
    with torch.random.fork_rng(devices=[]):
        table = _trace(copy.deepcopy(scheduler), seeded)
        error = max(_probe(copy.deepcopy(scheduler), table, seed, seeded) for seed in (0, 1))
    if not error < TOLERANCE:
        raise UnsupportedModelError(_why_not_linear(scheduler, error))
    return table


def _trace(scheduler: Any, seeded: bool) -> SchedulerTable:
    """Sample = first basis vector, k-th output = (k+1)-th: after each step the sample is its own row of weights."""
    calls = len(scheduler.timesteps)
    basis = torch.eye(calls + 1, dtype=torch.float64).view(calls + 1, 1, calls + 1, 1, 1)
    rows: list[tuple[float, ...]] = []
    scales: list[float] = []

    def model(scaled: Tensor, sample: Tensor, call: int) -> Tensor:
        scales.append(_ratio(scaled, sample))
        return basis[call + 1]

    for call, sample in enumerate(_run(scheduler, basis[0], model, seeded)):
        rows.append(tuple(sample.flatten()[: call + 2].tolist()))
    return SchedulerTable(
        # Flow matching starts from the noise as it is.
        init_noise_sigma=float(getattr(scheduler, "init_noise_sigma", 1.0)),
        timesteps=tuple(float(timestep) for timestep in scheduler.timesteps),
        input_scale=tuple(scales),
        coefficients=tuple(rows),
    )


def _run(
    scheduler: Any, sample: Tensor, model: Callable[[Tensor, Tensor, int], Tensor], seeded: bool
) -> Iterable[Tensor]:
    """The scheduler's own loop, giving each sample; `model` gets the scaled and the plain sample."""
    scales = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    extras = step_extras(scheduler, torch.Generator().manual_seed(0) if seeded else None)
    for call, timestep in enumerate(scheduler.timesteps):
        scaled = scales(sample, timestep)
        sample = scheduler.step(model(scaled, sample, call), timestep, sample, return_dict=False, **extras)[0]
        yield sample


def _ratio(scaled: Tensor, sample: Tensor) -> float:
    largest = int(sample.abs().argmax())
    return float(scaled.flatten()[largest] / sample.flatten()[largest])


def _probe(scheduler: Any, table: SchedulerTable, seed: int, seeded: bool) -> float:
    """Largest difference between the table and a real run on random numbers, relative to the run's largest value."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 3, 4, 4)
    terms = [PROBE_SPREAD * torch.randn(shape, generator=generator, dtype=torch.float64)]
    worst, largest = 0.0, float(terms[0].abs().max())

    def model(scaled: Tensor, sample: Tensor, call: int) -> Tensor:
        nonlocal worst
        worst = max(worst, float((scaled - sample * table.input_scale[call]).abs().max()))
        terms.append(PROBE_SPREAD * torch.randn(shape, generator=generator, dtype=torch.float64))
        return terms[-1]

    for row, sample in zip(table.coefficients, _run(scheduler, terms[0], model, seeded), strict=True):
        predicted = sum(weight * term for weight, term in zip(row, terms, strict=True))
        worst = max(worst, float((sample - predicted).abs().max()))
        largest = max(largest, float(sample.abs().max()))
    return worst / largest


def _why_not_linear(scheduler: Any, error: float) -> str:
    return (
        f"{type(scheduler).__name__} is not linear in the noise and the model's outputs (it draws noise in a way of its own, "
        f"or changes its rule on the way): a table misses a real run by {error:.1%}. An export samples by table: in the "
        "pipeline's folder, before it is compressed, take DDIM, DDPM, LCM, Euler, EulerAncestral, DPM-Solver++, UniPC or PNDM "
        "as scheduler (an artifact's files are under digests: compress it anew)."
    )


def _check_unscaled(scheduler: Any, table: SchedulerTable) -> None:
    factors = (table.init_noise_sigma, *table.input_scale)
    if any(abs(factor - 1) > TOLERANCE for factor in factors):
        raise UnsupportedModelError(
            f"{type(scheduler).__name__} scales the noise or the model's input, which this pipeline class never asks "
            "for, so its images would be wrong in diffusers too. Use DDIM, DPM-Solver++, UniPC or PNDM."
        )
