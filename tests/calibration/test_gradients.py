"""A whole run with its graph: the latents of `sample`, and a word about what lets no gradient through."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, IPNDMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

import diffpress
from diffpress.calibration.conditions import Condition
from diffpress.calibration.gradients import sample_with_gradients
from diffpress.calibration.sampling import Sampling, denoiser_of, sample
from diffpress.compress.overlay import frozen, overlaid
from diffpress.export.artifact import load_pipeline
from diffpress.export.errors import UnsupportedModelError
from diffpress.export.folder import PipelineFolder

SOURCES = ["tiny_text", "tiny_class", "tiny_pixels"]
FOUR = Sampling(4, 3.0)
Two = Callable[[str], list[Condition]]


@pytest.mark.parametrize("source", SOURCES)
def test_latents_are_those_of_sampling_to_the_bit(source: str, double: Callable[..., Any], two_of: Two) -> None:
    pipeline = double(source)
    expected = sample(pipeline, two_of(source), FOUR).latents
    for context in (nullcontext(), diffpress.checkpoint_steps(pipeline)):
        with context:
            latents = sample_with_gradients(pipeline, two_of(source), FOUR)
        assert latents.requires_grad
        assert torch.equal(latents, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_latents_have_single_precision_at_least(dtype: torch.dtype, tiny_pixels: Path, two_of: Two) -> None:
    pipeline = load_pipeline(PipelineFolder(tiny_pixels, "x"), dtype)
    latents = sample_with_gradients(pipeline, two_of("tiny_pixels"), Sampling(2))
    assert latents.dtype == torch.float32
    assert torch.equal(latents, sample(pipeline, two_of("tiny_pixels"), Sampling(2)).latents)


def test_all_images_are_there_where_each_is_decoded_alone(two_calls: Any, two_of: Two) -> None:
    latents = sample_with_gradients(two_calls, two_of("tiny_pixels"), FOUR)
    assert latents.shape == (2, 3)
    assert torch.equal(latents, sample(two_calls, two_of("tiny_pixels"), FOUR).latents)


def test_only_the_denoiser_has_a_graph(double: Callable[..., Any], two_of: Two) -> None:
    pipeline = double("tiny_text")
    sample_with_gradients(pipeline, two_of("tiny_text"), FOUR).sum().backward()
    assert all(parameter.grad is not None for parameter in pipeline.unet.parameters())
    others = [*pipeline.text_encoder.parameters(), *pipeline.vae.parameters()]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in others)


def test_the_callers_own_noise_is_not_spent_on_checks(double: Callable[..., Any], two_of: Two) -> None:
    """A scheduler that is given no generator draws as it does in `sample`."""

    class Noisy(DDIMScheduler):
        def step(self, model_output: Tensor, *arguments: Any, **options: Any) -> Any:
            return super().step(model_output + 0.01 * torch.randn_like(model_output), *arguments, **options)

    pipeline = double("tiny_class", Noisy())
    torch.manual_seed(3)
    expected = sample(pipeline, two_of("tiny_class"), FOUR).latents
    torch.manual_seed(3)
    assert torch.equal(sample_with_gradients(pipeline, two_of("tiny_class"), FOUR), expected)


# What is refused, and by which name.


class NoGradient(DDIMScheduler):
    @torch.no_grad()
    def step(self, *arguments: Any, **options: Any) -> Any:
        return super().step(*arguments, **options)


class Inference(DDIMScheduler):
    @torch.inference_mode()
    def step(self, *arguments: Any, **options: Any) -> Any:
        return super().step(*arguments, **options)


class DetachedSample(DDIMScheduler):
    """Gradients still reach every step, through the denoiser, but they are wrong."""

    def step(self, model_output: Tensor, timestep: int, sample: Tensor, **options: Any) -> Any:
        return super().step(model_output, timestep, sample.detach(), **options)


class DetachedLate(DDIMScheduler):
    def step(self, model_output: Tensor, timestep: int, sample: Tensor, **options: Any) -> Any:
        return super().step(model_output.data if timestep < 300 else model_output, timestep, sample, **options)


class Rounding(DDIMScheduler):
    def step(self, *arguments: Any, return_dict: bool = True, **options: Any) -> Any:
        sample = self.rounded(super().step(*arguments, **options).prev_sample * 64) / 64
        return DDIMSchedulerOutput(sample) if return_dict else (sample,)

    def rounded(self, x: Tensor) -> Tensor:
        return x.round()


class Whole(Rounding):
    def rounded(self, x: Tensor) -> Tensor:
        return x.int()


class Numpy(DDIMScheduler):
    def step(self, model_output: Tensor, *arguments: Any, **options: Any) -> Any:
        return super().step(torch.from_numpy(model_output.numpy()), *arguments, **options)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("scheduler", "named"),
    [
        (NoGradient, r"DDIMScheduler\.step \(scheduling_ddim.py"),
        (Inference, r"DDIMScheduler\.step \(scheduling_ddim.py"),
        (DetachedSample, r"DetachedSample\.step \(.*torch\.Tensor\.detach\)"),
        (DetachedLate, r"DetachedLate\.step \(.*torch\.Tensor\.data.*at time step 2"),
        (Rounding, r"Rounding\.rounded \(.*torch\.Tensor\.round\)"),
        (Whole, r"Whole\.rounded \(.*torch\.Tensor\.int\)"),
        (Numpy, r"Numpy\.step \(test_gradients.py, line \d+"),
    ],
)
def test_a_step_without_a_gradient_is_named_before_any_sampling(
    scheduler: type[DDIMScheduler],
    named: str,
    source: str,
    double: Callable[..., Any],
    two_of: Two,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline, calls = double(source, scheduler(timestep_spacing="trailing")), []
    denoiser = denoiser_of(pipeline)
    forward = type(denoiser).forward

    @wraps(forward)
    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(self)
        return forward(self, *arguments, **options)

    monkeypatch.setattr(type(denoiser), "forward", counted)
    with pytest.raises(UnsupportedModelError, match=named):
        sample_with_gradients(pipeline, two_of(source), FOUR)
    assert len(calls) == 1
    assert "forward" not in vars(denoiser)


def test_what_has_no_part_in_the_latents_may_lose_its_gradient(double: Callable[..., Any], two_of: Two) -> None:
    class Logging(DDIMScheduler):
        def step(self, model_output: Tensor, *arguments: Any, **options: Any) -> Any:
            self.seen = model_output.detach().float() * 2
            self.largest = model_output.abs().max().item()
            return super().step(model_output, *arguments, **options)

    pipeline = double("tiny_class", Logging())
    assert sample_with_gradients(pipeline, two_of("tiny_class"), FOUR).requires_grad
    assert not pipeline.scheduler.seen.requires_grad


def test_a_step_that_truly_has_no_weight_is_no_obstacle(double: Callable[..., Any], two_of: Two) -> None:
    """With IPNDM the first answer is multiplied by zero."""
    assert sample_with_gradients(double("tiny_class", IPNDMScheduler()), two_of("tiny_class"), FOUR).requires_grad


def test_a_layer_without_a_gradient_is_named(double: Callable[..., Any], two_of: Two) -> None:
    pipeline = double("tiny_class")
    name = "transformer_blocks.1"
    assert sample_with_gradients(pipeline, two_of("tiny_class"), FOUR).requires_grad
    hard = {name: lambda beneath: lambda *arguments, **options: beneath(*arguments, **options).detach()}
    with (
        overlaid(pipeline.transformer, hard),
        pytest.raises(UnsupportedModelError, match=rf"gradient: {name} \(BasicTransformerBlock\)"),
    ):
        sample_with_gradients(pipeline, two_of("tiny_class"), FOUR)


def test_something_has_to_learn(double: Callable[..., Any], two_of: Two) -> None:
    pipeline = double("tiny_class")
    for _ in range(2):
        with frozen(pipeline.transformer), pytest.raises(UnsupportedModelError, match="DiTTransformer2DModel computes"):
            sample_with_gradients(pipeline, two_of("tiny_class"), FOUR)
        # Gradients were found to go through, which is not asked for a second time.
        sample_with_gradients(pipeline, two_of("tiny_class"), FOUR)


def test_faults_of_another_kind_stay_what_they_are(double: Callable[..., Any]) -> None:
    with pytest.raises(IndexError):
        sample_with_gradients(double("tiny_class"), [Condition("5000", 0)], FOUR)
