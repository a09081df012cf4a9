"""How much each step is learned from."""

from __future__ import annotations

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
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from diffpress.compress.qalora.importance import EVEN_SHARE, StepImportance, step_importance

LINEAR = {
    "DDIM": DDIMScheduler(clip_sample=False),
    "DDIM v": DDIMScheduler(clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing"),
    "Euler": EulerDiscreteScheduler(),
    "DPM-Solver++": DPMSolverMultistepScheduler(),
    "UniPC": UniPCMultistepScheduler(),
}
OTHER = {
    "clipping": DDIMScheduler(clip_sample=True),
    "fresh noise": DDPMScheduler(clip_sample=False),
    "ancestral": EulerAncestralDiscreteScheduler(),
}
ROUNDING = 2.0**-24
"""Of a float32, relative."""
MORE_CALLS_THAN_STEPS = {"PNDM": PNDMScheduler(skip_prk_steps=True), "Heun": HeunDiscreteScheduler()}


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("scheduler", [*LINEAR.values(), *OTHER.values()], ids=[*LINEAR, *OTHER])
def test_shares_sum_to_one_and_no_step_is_left_out(scheduler: Any, steps: int) -> None:
    found, weights = step_importance(scheduler, steps)
    assert found.shape == weights.shape == (steps,)
    # As many roundings as there are steps.
    assert float(found.sum()) == pytest.approx(1, abs=steps * torch.finfo(torch.float32).eps)
    assert (found >= EVEN_SHARE / steps * (1 - torch.finfo(torch.float32).eps)).all()
    assert float((found * weights.square()).sum()) == pytest.approx(1, abs=3 * steps * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("steps", [3, 10])
def test_v_prediction_learns_most_from_the_last_step(recorded: Callable[[str], Any], steps: int) -> None:
    """Its weight in the last sample is what DDIM says: sqrt(1 - a) of the last step, as the next is free of noise."""
    scheduler = recorded("tiny_text").pipeline.scheduler
    found, _ = step_importance(scheduler, steps)
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
    found = step_importance(scheduler, steps)
    assert ((found.sampling_probabilities - expected).abs() <= missed).all()
    # Drawn so and weighted so, a step's error counts on average as it does in the sample. Two products more are rounded.
    drawn = found.sampling_probabilities.double() * found.weights.double()
    total, ratio = weights.sum(), weights / weights.sum()
    missed = (errors + ratio.abs() * errors.sum()) / total.abs() + 2 * steps * ROUNDING * ratio.abs()
    assert ((drawn / drawn.sum() - ratio).abs() <= missed).all()


@pytest.mark.parametrize(
    "scheduler", [*OTHER.values(), *MORE_CALLS_THAN_STEPS.values()], ids=[*OTHER, *MORE_CALLS_THAN_STEPS]
)
def test_schedulers_that_are_no_table_of_steps_are_learned_evenly(scheduler: Any) -> None:
    found = step_importance(scheduler, 4)
    assert torch.equal(found.sampling_probabilities, torch.full((4,), 0.25))
    assert torch.equal(found.weights, torch.ones(4))


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
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(7)
    step_importance(scheduler, 3)
    assert len(scheduler.timesteps) == 7
