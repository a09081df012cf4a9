"""Schedulers as tables."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from diffpress.export.errors import UnsupportedModelError
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
    "unipc": diffusers.UniPCMultistepScheduler(**BETAS),
    "pndm": diffusers.PNDMScheduler(**BETAS),
    "plms": diffusers.PNDMScheduler(skip_prk_steps=True, **BETAS),
}


def toy_model(sample: torch.Tensor, timestep: float) -> torch.Tensor:
    """Anything that depends on both and is not linear."""
    return torch.sin(sample * 2 + timestep / 300) + 0.3 * sample.roll(1, -1)


@pytest.mark.parametrize("steps", [4, 10, 25])
@pytest.mark.parametrize("name", LINEAR)
def test_equals_the_real_run(name: str, steps: int) -> None:
    scheduler, noise = LINEAR[name], torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    scheduler.set_timesteps(steps)
    sample = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        output = toy_model(scheduler.scale_model_input(sample, timestep), float(timestep))
        sample = scheduler.step(output, timestep, sample).prev_sample

    def denoise(scaled: Any, timestep: float) -> Any:
        return toy_model(torch.from_numpy(scaled), timestep).numpy()

    found = sample_by_table(noise.numpy(), build_table(scheduler, steps), denoise)
    # float32 rounding, grown by as many steps and by the slope of the toy model.
    np.testing.assert_allclose(found, sample.numpy(), atol=1e-4 * float(sample.abs().max()))


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (diffusers.DDIMScheduler(), "clip_sample=True"),
        (diffusers.DDIMScheduler(clip_sample=False, thresholding=True), "thresholding=True"),
        (diffusers.DDPMScheduler(clip_sample=False), "fresh noise"),
        (diffusers.EulerAncestralDiscreteScheduler(), "fresh noise"),
        (diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), "fresh noise"),
    ],
)
def test_what_is_not_linear_is_refused(scheduler: Any, words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        build_table(scheduler, 10)


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
