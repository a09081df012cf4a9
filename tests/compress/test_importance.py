"""How much each step is learned from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from diffpress.compress.importance import EVEN_SHARE, StepImportance, step_importance

LINEAR = {
    "DDIM": DDIMScheduler(clip_sample=False),
    "DDIM v": DDIMScheduler(clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing"),
    "Euler": EulerDiscreteScheduler(),
    "DPM-Solver++": DPMSolverMultistepScheduler(),
    "UniPC": UniPCMultistepScheduler(),
    "flow matching": FlowMatchEulerDiscreteScheduler(shift=3.0),
}
OTHER = {
    "clipping": DDIMScheduler(clip_sample=True),
    "fresh noise": DDPMScheduler(clip_sample=False),
    "ancestral": EulerAncestralDiscreteScheduler(),
}
ROUNDING = 2.0**-24
"""Of a float32, relative."""
TWICE_A_STEP = {
    "PNDM": PNDMScheduler(skip_prk_steps=True),
    "Heun": HeunDiscreteScheduler(),
    "flow matching, Heun": FlowMatchHeunDiscreteScheduler(),
}


def importance_of(scheduler: Any, steps: int, **options: Any) -> StepImportance:
    """As where a pipeline sets up this scheduler: which of its updates are of one time step shows in the recording."""
    scheduler.set_timesteps(steps, **options)
    times = scheduler.timesteps.tolist()
    return step_importance(scheduler, [list(dict.fromkeys(times)).index(time) for time in times])


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("scheduler", [*LINEAR.values(), *OTHER.values()], ids=[*LINEAR, *OTHER])
def test_shares_sum_to_one_and_no_step_is_left_out(scheduler: Any, steps: int) -> None:
    found, weights = importance_of(scheduler, steps)
    assert found.shape == weights.shape == (steps,)
    # As many roundings as there are steps.
    assert float(found.sum()) == pytest.approx(1, abs=steps * torch.finfo(torch.float32).eps)
    assert (found >= EVEN_SHARE / steps * (1 - torch.finfo(torch.float32).eps)).all()
    assert float((found * weights.square()).sum()) == pytest.approx(1, abs=3 * steps * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("steps", [3, 10])
def test_v_prediction_learns_most_from_the_last_step(recorded: Callable[[str], Any], steps: int) -> None:
    """Its weight in the last sample is what DDIM says: sqrt(1 - a) of the last step, as the next is free of noise."""
    scheduler = copy.deepcopy(recorded("tiny_text").pipeline.scheduler)
    found, _ = importance_of(scheduler, steps)
    assert int(found.argmax()) == steps - 1


def test_the_weights_are_the_schedulers_own() -> None:
    """DDIM on noise: x' = sqrt(a') (x - sqrt(1 - a) e) / sqrt(a) + sqrt(1 - a') e, followed to the end by hand.

    The scheduler takes its square roots and quotients in float32. Of a step's two terms none passes four roundings, and
    every later step that scales them adds two; what they cancel of each other leaves their errors as they were. A share
    errs by its own weight's error and, through the sum of all, by its part of everybody's; then it is rounded thrice.
    """
    scheduler = LINEAR["DDIM"]
    steps = 4
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.tolist()
    alphas = [float(scheduler.alphas_cumprod[time]) for time in times] + [1.0]
    terms = []
    for index in range(steps):
        here, there = alphas[index], alphas[index + 1]
        # Whatever a step adds is scaled by all steps after it.
        later = (alphas[-1] / there) ** 0.5
        terms.append([later * (1 - there) ** 0.5, -later * (there / here) ** 0.5 * (1 - here) ** 0.5])
    both = torch.tensor(terms, dtype=torch.float64)
    weights, magnitudes = both.sum(1), both.abs().sum(1)
    errors = (4 + 2 * torch.arange(steps - 1, -1, -1)) * ROUNDING * magnitudes
    shares, total = weights.abs() / weights.abs().sum(), weights.abs().sum()
    expected = (1 - EVEN_SHARE) * shares + EVEN_SHARE / steps
    missed = (1 - EVEN_SHARE) * (errors + shares * errors.sum()) / total + 3 * ROUNDING * expected
    found = importance_of(scheduler, steps)
    assert ((found.sampling_probabilities - expected).abs() <= missed).all()
    # Drawn so and weighted so, a step's error counts on average as it does in the sample. Two products more are rounded.
    drawn = found.sampling_probabilities.double() * found.weights.double()
    total, ratio = weights.sum(), weights / weights.sum()
    missed = (errors + ratio.abs() * errors.sum()) / total.abs() + 2 * steps * ROUNDING * ratio.abs()
    assert ((drawn / drawn.sum() - ratio).abs() <= missed).all()


@pytest.mark.parametrize("scheduler", OTHER.values(), ids=OTHER)
def test_schedulers_that_are_no_table_are_learned_evenly(scheduler: Any) -> None:
    found = importance_of(scheduler, 4)
    assert torch.equal(found.sampling_probabilities, torch.full((4,), 0.25))
    assert torch.equal(found.weights, torch.ones(4))


def test_flow_matchings_weights_are_the_distances_between_sigmas() -> None:
    """x' = x + (s' - s) v, with the sigmas that the pipeline sets: here shifted by mu."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    found = importance_of(scheduler, 4, mu=0.8)
    check_drawn(found, scheduler.sigmas.diff())


def test_both_updates_of_a_step_weigh_in() -> None:
    """Heun gives half of a distance to either end of it; the two updates at one time step are drawn as two examples."""
    scheduler = FlowMatchHeunDiscreteScheduler()
    found = importance_of(scheduler, 4)
    far = scheduler.sigmas[scheduler.sigmas != 0].unique().flip(0)
    apart = far.diff() / 2
    # At all but the first and the last step it ends one distance and begins the next; Euler makes the last step.
    expected = torch.stack([apart[0], (apart[0] + apart[1]) / 2, (apart[1] + apart[2]) / 2, (apart[2] - far[-1]) / 2])
    check_drawn(found, expected)


def check_drawn(found: StepImportance, weights: Tensor) -> None:
    """Drawn so and weighted so, a step's error counts on average by `weights`, but for one factor of all."""
    drawn = found.sampling_probabilities * found.weights
    # Sums of as many roundings as there are steps, once to make the sample and once to scale.
    bound = 4 * len(weights) * torch.finfo(torch.float32).eps
    assert torch.allclose(drawn / drawn.sum(), weights / weights.sum(), rtol=0, atol=bound)


@pytest.mark.parametrize("scheduler", TWICE_A_STEP.values(), ids=TWICE_A_STEP)
def test_schedulers_that_ask_twice_at_a_step_are_tables_too(scheduler: Any) -> None:
    found = importance_of(scheduler, 4)
    assert not torch.equal(found.weights, torch.ones(len(found.weights)))


def test_a_recording_that_is_not_the_schedulers_own_is_learned_evenly() -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(4)
    assert torch.equal(step_importance(scheduler, [0, 1, 2]).weights, torch.ones(3))


def test_errors_that_point_the_same_way_cost_more_than_those_that_do_not() -> None:
    importance = StepImportance(torch.tensor([0.5, 0.5]), torch.tensor([1.0, -1.0]))
    steps, error = torch.tensor([0, 1, 0, 1]), torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    # Against the sign of the second step's weight they add up; with it they cancel out.
    adding = torch.stack([error[0], -error[0], error[1], -error[1]])
    assert float(importance.accumulated(adding, steps, 2)) == pytest.approx(2 * float(error.square().mean()))
    assert float(importance.accumulated(adding.abs(), steps, 2)) == 0
    # One at a time it is the mean square.
    assert float(importance.accumulated(adding, steps, 1)) == pytest.approx(float(error.square().mean()))


def test_the_scheduler_is_left_as_it_was() -> None:
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(7)
    step_importance(scheduler, range(7))
    assert len(scheduler.timesteps) == 7
    assert scheduler.step_index is None
