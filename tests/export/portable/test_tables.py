"""Schedulers as tables."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from diffpress.export.errors import UnsupportedModelError
from diffpress.export.portable.noise import TorchNoise
from diffpress.export.portable.sampler import sample_by_table
from diffpress.export.portable.tables import build_table, build_tables

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LINEAR = {
    "ddim": diffusers.DDIMScheduler(clip_sample=False, **BETAS),
    "ddim-v-trailing": diffusers.DDIMScheduler(
        clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing"
    ),
    "ddim-zero-snr": diffusers.DDIMScheduler(
        clip_sample=False,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    ),
    "euler": diffusers.EulerDiscreteScheduler(**BETAS),
    "euler-karras": diffusers.EulerDiscreteScheduler(use_karras_sigmas=True, **BETAS),
    "heun": diffusers.HeunDiscreteScheduler(**BETAS),
    "dpm++": diffusers.DPMSolverMultistepScheduler(**BETAS),
    "dpm++-3": diffusers.DPMSolverMultistepScheduler(solver_order=3, **BETAS),
    "tcd": diffusers.TCDScheduler(**BETAS),
    "unipc": diffusers.UniPCMultistepScheduler(**BETAS),
    "pndm": diffusers.PNDMScheduler(**BETAS),
    "plms": diffusers.PNDMScheduler(skip_prk_steps=True, **BETAS),
}


def toy_model(sample: torch.Tensor, timestep: float) -> torch.Tensor:
    """Anything that depends on both and is not linear."""
    return torch.sin(sample * 2 + timestep / 300) + 0.3 * sample.roll(1, -1)


DRAWING = {
    "ddim-clipped": diffusers.DDIMScheduler(),
    "ddim-clipped-v": diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample_range=0.7),
    "ddpm": diffusers.DDPMScheduler(clip_sample=False),
    "ddpm-clipped": diffusers.DDPMScheduler(),
    "ddpm-large": diffusers.DDPMScheduler(variance_type="fixed_large", prediction_type="sample"),
    "lcm": diffusers.LCMScheduler(**BETAS),
    "euler-a": diffusers.EulerAncestralDiscreteScheduler(**BETAS),
    "kdpm2-a": diffusers.KDPM2AncestralDiscreteScheduler(**BETAS),
    "dpm++-sde": diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **BETAS),
    "consistency": diffusers.CMStochasticIterativeScheduler(),
    "sa": diffusers.SASolverScheduler(**BETAS),
}
SEED = 7


@pytest.mark.parametrize("steps", [1, 4, 25])
@pytest.mark.parametrize("name", [*LINEAR, *DRAWING])
def test_equals_the_real_run(name: str, steps: int) -> None:
    scheduler, generator = (LINEAR | DRAWING)[name], torch.Generator().manual_seed(SEED)
    noise = torch.randn(1, 3, 8, 8, generator=generator)
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, IndexError) as error:
        pytest.skip(f"{name} makes no {steps} steps: {error}")
    # What diffusers' pipelines hand on.
    takes = inspect.signature(scheduler.step).parameters
    seeded = {name: value for name, value in (("generator", generator), ("eta", 0.0)) if name in takes}
    sample = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        output = toy_model(scheduler.scale_model_input(sample, timestep), float(timestep))
        sample = scheduler.step(output, timestep, sample, **seeded, return_dict=False)[0]

    def denoise(scaled: Any, timestep: float) -> Any:
        return toy_model(torch.from_numpy(scaled), timestep).numpy()

    table, same = build_table(scheduler, steps), TorchNoise(SEED)
    found = sample_by_table(same.draw(noise.shape), table, denoise, lambda: same.draw(noise.shape))
    # A single step may have nothing to draw.
    assert (table.updates is not None) == (name in DRAWING) or steps == 1
    # float32 rounding, grown by as many steps and by the slope of the toy model.
    np.testing.assert_allclose(found, sample.numpy(), atol=1e-4 * float(sample.abs().max()))


def test_thresholding_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="thresholding=True, which looks at all pixels"):
        build_table(diffusers.DDIMScheduler(clip_sample=False, thresholding=True), 10)


def test_noise_from_no_generator_is_refused() -> None:
    build_table(diffusers.DDIMScheduler(), 10, seeded=False)
    with pytest.raises(UnsupportedModelError, match="draws noise, and from no generator in this pipeline"):
        build_table(diffusers.DDPMScheduler(), 10, seeded=False)


def test_a_step_without_history_takes_what_it_needs_alone() -> None:
    """A thousand steps are no million numbers."""
    table = build_table(diffusers.DDPMScheduler(), 100)
    assert table.updates is not None
    assert not table.coefficients
    # The clipped sample of two terms, the noise, and a sum of three.
    assert [[len(own.weights or ()) for own in update] for update in table.updates[:-1]] == [[2, 0, 3]] * 99
    assert [(own.low, own.high) for own in table.updates[0]] == [(-1, 1), (None, None), (None, None)]


def test_steps_that_a_scheduler_does_not_make_are_left_out() -> None:
    scheduler = diffusers.LCMScheduler(original_inference_steps=20)
    assert sorted(build_tables(scheduler, 4, (10, 50), scales_input=True)) == [4, 10]


def test_too_many_steps_are_refused_and_others_left_out() -> None:
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=20, clip_sample=False)
    assert sorted(build_tables(scheduler, 5, (10, 50), scales_input=False)) == [5, 10]
    with pytest.raises(UnsupportedModelError, match=r"sampling\.steps"):
        build_table(scheduler, 50)


def test_scaling_that_the_pipeline_never_asks_for_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="never asks"):
        build_table(LINEAR["euler"], 10, scales_input=False)


def test_the_scheduler_and_the_random_state_are_left_as_they_were() -> None:
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    before = torch.get_rng_state()
    build_table(scheduler, 10)
    assert scheduler.num_inference_steps is None
    assert torch.equal(before, torch.get_rng_state())
