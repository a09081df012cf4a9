"""The pipeline is the sampler: paired images, watched calls, replay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler, PNDMScheduler
from torch import Tensor, nn

from diffpress.calibration.conditions import Condition, conditions
from diffpress.calibration.sampling import Call, Sampling, denoiser_of, replay, sample, watch
from diffpress.export.artifact import load_pipeline
from diffpress.export.errors import UnsupportedModelError, UserError
from diffpress.export.folder import PipelineFolder

SOURCES = ["tiny_text", "tiny_class", "tiny_pixels"]
THREE = Sampling(3, 3.0)


@pytest.fixture(scope="module")
def pipelines(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    """A function: the loaded pipeline of that name, loaded once."""
    loaded: dict[str, Any] = {}

    def pipeline(source: str) -> Any:
        if source not in loaded:
            loaded[source] = load_pipeline(PipelineFolder(request.getfixturevalue(source), source))
        return loaded[source]

    return pipeline


def watched(pipeline: Any, wanted: list[Condition], sampling: Sampling) -> list[Call]:
    calls: list[Call] = []
    with watch(pipeline, calls.append):
        sample(pipeline, wanted, sampling)
    return calls


@pytest.mark.parametrize("source", SOURCES)
def test_pictures_are_paired_by_seed(source: str, pipelines: Callable[[str], Any]) -> None:
    pipeline = pipelines(source)
    first, second = conditions(pipeline, "builtin", 2, seed=7)
    both = sample(pipeline, [first, second], THREE)
    again = sample(pipeline, [first, second], THREE)
    assert torch.equal(both.images, again.images)
    assert torch.equal(both.latents, again.latents)
    assert both.images.min() >= 0
    assert both.images.max() <= 1
    assert both.images.dtype == both.latents.dtype == torch.float32

    singles = [sample(pipeline, [condition], THREE) for condition in (first, second)]
    layers = [layer for layer in denoiser_of(pipeline).modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    longest = max(layer.weight[0].numel() for layer in layers)
    # Every layer of every step may add its longest sum in another order.
    tolerance = 3 * len(layers) * longest * torch.finfo(torch.float32).eps
    assert torch.allclose(both.images, torch.cat([single.images for single in singles]), rtol=0, atol=tolerance)
    other = sample(pipeline, [Condition(first.text, 8)], THREE)
    assert (other.images - singles[0].images).abs().max() > 10 * tolerance


@pytest.mark.parametrize("source", ["tiny_text", "tiny_class"])
def test_latents_are_what_was_decoded(source: str, pipelines: Callable[[str], Any]) -> None:
    pipeline = pipelines(source)
    result = sample(pipeline, conditions(pipeline, "builtin", 2, 0), THREE)
    assert result.latents.shape == (2, 4, 8, 8)
    with torch.no_grad():
        decoded = pipeline.vae.decode(result.latents).sample
    assert torch.equal((decoded / 2 + 0.5).clamp(0, 1), result.images)


def test_the_decoder_is_left_as_it_was_even_after_a_failure(pipelines: Callable[[str], Any]) -> None:
    pipeline = pipelines("tiny_class")
    sample(pipeline, [Condition("1", 0)], THREE)
    assert "decode" not in vars(pipeline.vae)
    with pytest.raises(UserError, match="DiTPipeline does not take this call: index out of range"):
        sample(pipeline, [Condition("5000", 0)], THREE)
    assert "decode" not in vars(pipeline.vae)


def test_pixels_stand_for_latents_where_there_are_none(pipelines: Callable[[str], Any]) -> None:
    result = sample(pipelines("tiny_pixels"), [Condition("", 0)], THREE)
    assert result.images.shape == (1, 1, 8, 8)
    assert torch.equal(result.latents, result.images * 2 - 1)


def test_half_precision_pictures_are_measured_in_single(tiny_pixels: Path) -> None:
    pipeline = load_pipeline(PipelineFolder(tiny_pixels, "x"), torch.float16)
    assert sample(pipeline, [Condition("", 0)], Sampling(2)).images.dtype == torch.float32


def test_what_is_left_out_is_the_pipelines_default(pipelines: Callable[[str], Any]) -> None:
    calls = watched(pipelines("tiny_pixels"), [Condition("", 0)], Sampling())
    assert len(calls) == 50


@pytest.mark.parametrize(
    ("source", "scale", "rows"), [("tiny_text", 3.0, 4), ("tiny_text", 1.0, 2), ("tiny_class", 3.0, 4)]
)
def test_guidance_doubles_the_batch(source: str, scale: float, rows: int, pipelines: Callable[[str], Any]) -> None:
    pipeline = pipelines(source)
    calls = watched(pipeline, conditions(pipeline, "builtin", 2, 0), Sampling(3, scale))
    assert [call.step for call in calls] == [0, 1, 2]
    assert all(len(call.output) == rows for call in calls)


@pytest.mark.parametrize("source", SOURCES)
def test_replay_is_bit_for_bit(source: str, pipelines: Callable[[str], Any]) -> None:
    pipeline = pipelines(source)
    for call in watched(pipeline, conditions(pipeline, "builtin", 2, 0), THREE):
        assert torch.equal(replay(denoiser_of(pipeline), call), call.output)


def test_watching_ends(pipelines: Callable[[str], Any]) -> None:
    pipeline, calls = pipelines("tiny_pixels"), []
    with watch(pipeline, calls.append):
        pass
    sample(pipeline, [Condition("", 0)], THREE)
    assert not calls
    assert not denoiser_of(pipeline)._forward_hooks


@pytest.mark.parametrize("scheduler", [PNDMScheduler(skip_prk_steps=True), HeunDiscreteScheduler()], ids=type)
def test_repeated_time_steps_are_one_step(scheduler: Any, tiny_text: Path) -> None:
    pipeline = load_pipeline(PipelineFolder(tiny_text, "x"))
    pipeline.scheduler = scheduler
    calls = watched(pipeline, [Condition("red apple", 0)], Sampling(4, 1.0))
    asked = [float(timestep) for timestep in scheduler.timesteps]
    distinct = sorted(set(asked), reverse=True)
    assert len(asked) > len(distinct) == 4
    assert [float(call.inputs["timestep"].flatten()[0]) for call in calls] == asked
    assert [call.step for call in calls] == [distinct.index(timestep) for timestep in asked]


class Denoiser(nn.Module):
    """Takes everything a denoiser may take."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        added_cond_kwargs: dict[str, Any] | None = None,
        scale: float = 1.0,
        residuals: list[Tensor] | None = None,
        return_dict: bool = True,
    ) -> Any:
        output = self.layer(sample) * scale + torch.as_tensor(timestep).float().sin().to(sample)
        if added_cond_kwargs:
            output = output + added_cond_kwargs["time_ids"] + added_cond_kwargs["image"]["mean"]
        return SimpleNamespace(sample=output) if return_dict else (output,)


class Pipeline:
    """Calls its denoiser as told; makes black images."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.unet, self.options = Denoiser(), options

    def __call__(self, batch_size: int, generator: Any, num_inference_steps: int = 2, output_type: str = "np") -> Any:
        for index in range(num_inference_steps):
            x = torch.randn(batch_size, 3, generator=generator[0]).to(next(self.unet.parameters()).dtype)
            timestep = self.options.get("timestep", 100) - index
            rest = {name: value for name, value in self.options.items() if name != "timestep"}
            self.unet(x, timestep, **rest)
        return SimpleNamespace(images=np.zeros((batch_size, 2, 2, 1), np.float32))


def test_dicts_inside_the_arguments_are_flattened_and_replayed() -> None:
    nested = {"time_ids": torch.rand(1, 3), "image": {"mean": torch.rand(1, 3), "none": None}, "text": "x"}
    pipeline = Pipeline(added_cond_kwargs=nested, scale=0.5, return_dict=False)
    calls = watched(pipeline, [Condition("", 0)], Sampling())
    names = {"sample", "timestep", "added_cond_kwargs/time_ids", "added_cond_kwargs/image/mean"}
    assert [call.inputs.keys() for call in calls] == [names, names]
    assert [int(call.inputs["timestep"]) for call in calls] == [100, 99]
    for call in calls:
        assert torch.equal(replay(pipeline.unet, call), call.output)


def test_time_steps_keep_their_precision_in_half_precision_models() -> None:
    pipeline = Pipeline(timestep=torch.tensor(980.27))
    pipeline.unet.half()
    for call in watched(pipeline, [Condition("", 0)], Sampling()):
        assert call.output.dtype == torch.float16
        assert torch.equal(replay(pipeline.unet, call), call.output)


def test_other_inputs_follow_the_dtype_of_the_model_they_are_replayed_on() -> None:
    pipeline = Pipeline(timestep=torch.tensor(980.27))
    call = watched(pipeline, [Condition("", 0)], Sampling(1))[0]
    output = replay(Pipeline().unet.to(torch.bfloat16), call)
    assert output.dtype == torch.bfloat16
    # Input, weights, sum, sine and result are rounded; the time step itself is not, or its sine would be another.
    tolerance = 5 * torch.finfo(torch.bfloat16).eps * (1 + call.output.abs())
    assert torch.all((output - call.output).abs() <= tolerance)


def test_what_cannot_be_kept_is_refused_rather_than_forgotten() -> None:
    with pytest.raises(UnsupportedModelError, match="a Generator as 'residuals/0'"):
        watched(Pipeline(residuals=[torch.Generator()]), [Condition("", 0)], Sampling())


class Renamed(nn.Module):
    """A denoiser that calls the time step `t`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, sample: Tensor, t: Tensor | float, return_dict: bool = True) -> tuple[Tensor]:
        return (self.layer(sample) + torch.as_tensor(t).float().sin().to(sample),)


class Unnamed(nn.Module):
    def forward(self, sample: Tensor, noise: float, return_dict: bool = True) -> tuple[Tensor]:
        return (sample,)


def test_steps_are_told_by_whatever_the_time_step_is_called() -> None:
    pipeline = Pipeline(timestep=torch.tensor(980.27))
    pipeline.unet = Renamed().half()  # type: ignore[assignment]
    calls = watched(pipeline, [Condition("", 0)], Sampling(3))
    assert [call.step for call in calls] == [0, 1, 2]
    # The time step keeps its precision under this name too.
    assert all(torch.equal(replay(pipeline.unet, call), call.output) for call in calls)


def test_a_denoiser_that_is_not_told_the_time_step_is_refused() -> None:
    pipeline = Pipeline()
    pipeline.unet = Unnamed()  # type: ignore[assignment]
    pipeline.unet.weight = nn.Parameter(torch.ones(1))
    with pytest.raises(UnsupportedModelError, match="Pipeline has no part that is told the time step"):
        watched(pipeline, [Condition("", 0)], Sampling(1))
