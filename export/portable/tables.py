"""Schedulers as tables: run the real one once on a basis, and its whole sampling run is a matrix."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from .manifest import SchedulerTable

STANDARD_STEPS = (10, 15, 20, 25, 30, 50)
NON_LINEAR = ("clip_sample", "thresholding")
PROBE_SPREAD = 3.0
"""Standard deviation of probing numbers: enough to meet every clipping that sampling would meet."""
TOLERANCE = 1e-4
"""Relative to the largest value of the run; schedulers compute in float32."""


def build_tables(scheduler: Any, wanted: int, others: Iterable[int], scales_input: bool) -> dict[int, SchedulerTable]:
    """Tables for `wanted` steps and for those of `others` that the scheduler has.

    Raises UnsupportedModelError where the scheduler is not linear, or has no `wanted` steps. `scales_input` tells
    whether the pipeline asks the scheduler to scale noise and inputs.
    """
    tables = {wanted: build_table(scheduler, wanted, scales_input)}
    most = getattr(scheduler.config, "num_train_timesteps", wanted)
    for steps in others:
        if steps not in tables and steps <= most:
            tables[steps] = build_table(scheduler, steps, scales_input)
    return tables


def build_table(scheduler: Any, steps: int, scales_input: bool = True) -> SchedulerTable:
    """The table for `steps` steps (see `build_tables`)."""
    scheduler = copy.deepcopy(scheduler)
    try:
        scheduler.set_timesteps(steps)
        table = table_of(scheduler)
    except (ValueError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"{type(scheduler).__name__} cannot make {steps} steps: {error} Take other `sampling.steps`."
        ) from error
    if not scales_input:
        _check_unscaled(scheduler, table)
    return table


def table_of(scheduler: Any) -> SchedulerTable:
    """The table of a scheduler whose steps are set, probed against a run on random numbers; it stays as it is.

    Raises UnsupportedModelError where it is not linear, and what the scheduler itself raises where it cannot run.
    """
    with torch.random.fork_rng(devices=[]):
        table = _trace(copy.deepcopy(scheduler))
        error = max(_probe(copy.deepcopy(scheduler), table, seed) for seed in (0, 1))
    if not error < TOLERANCE:
        raise UnsupportedModelError(_why_not_linear(scheduler, error))
    return table


def _trace(scheduler: Any) -> SchedulerTable:
    """Sample = first basis vector, k-th output = (k+1)-th: after each step the sample is its own row of weights."""
    calls = len(scheduler.timesteps)
    basis = torch.eye(calls + 1, dtype=torch.float64).view(calls + 1, 1, calls + 1, 1, 1)
    rows: list[tuple[float, ...]] = []
    scales: list[float] = []

    def model(scaled: Tensor, sample: Tensor, call: int) -> Tensor:
        scales.append(_ratio(scaled, sample))
        return basis[call + 1]

    for call, sample in enumerate(_run(scheduler, basis[0], model)):
        rows.append(tuple(sample.flatten()[: call + 2].tolist()))
    return SchedulerTable(
        # Flow matching starts from the noise as it is.
        init_noise_sigma=float(getattr(scheduler, "init_noise_sigma", 1.0)),
        timesteps=tuple(float(timestep) for timestep in scheduler.timesteps),
        input_scale=tuple(scales),
        coefficients=tuple(rows),
    )


def _run(scheduler: Any, sample: Tensor, model: Callable[[Tensor, Tensor, int], Tensor]) -> Iterable[Tensor]:
    """The scheduler's own loop, giving each sample; `model` gets the scaled and the plain sample."""
    scales = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    for call, timestep in enumerate(scheduler.timesteps):
        scaled = scales(sample, timestep)
        sample = scheduler.step(model(scaled, sample, call), timestep, sample, return_dict=False)[0]
        yield sample


def _ratio(scaled: Tensor, sample: Tensor) -> float:
    largest = int(sample.abs().argmax())
    return float(scaled.flatten()[largest] / sample.flatten()[largest])


def _probe(scheduler: Any, table: SchedulerTable, seed: int) -> float:
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

    for row, sample in zip(table.coefficients, _run(scheduler, terms[0], model), strict=True):
        predicted = sum(weight * term for weight, term in zip(row, terms, strict=True))
        worst = max(worst, float((sample - predicted).abs().max()))
        largest = max(largest, float(sample.abs().max()))
    return worst / largest


def _why_not_linear(scheduler: Any, error: float) -> str:
    found = [f"{name}=True" for name in NON_LINEAR if getattr(scheduler.config, name, False)]
    cause = f"because of {' and '.join(found)}" if found else "(it adds fresh noise, or changes its rule on the way)"
    cure = f"set {found[0].replace('True', 'False')}" if found else "use DDIM, Euler, DPM-Solver++, UniPC or PNDM"
    return (
        f"{type(scheduler).__name__} is not linear in the noise and the model's outputs {cause}: a table misses a real "
        f"run by {error:.1%}. An export samples by table: in the pipeline's folder, before it is compressed, {cure} in "
        "scheduler/scheduler_config.json (an artifact's files are under digests: compress it anew)."
    )


def _check_unscaled(scheduler: Any, table: SchedulerTable) -> None:
    factors = (table.init_noise_sigma, *table.input_scale)
    if any(abs(factor - 1) > TOLERANCE for factor in factors):
        raise UnsupportedModelError(
            f"{type(scheduler).__name__} scales the noise or the model's input, which this pipeline class never asks "
            "for, so its images would be wrong in diffusers too. Use DDIM, DPM-Solver++, UniPC or PNDM."
        )
