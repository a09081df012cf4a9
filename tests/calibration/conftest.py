"""Tiny pipelines whose gradients are compared, and the pipeline of this project's own that does everything at once."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffpress.calibration.conditions import Condition
from diffpress.export.artifact import load_pipeline
from diffpress.export.folder import PipelineFolder

TEXTS = {"tiny_text": "red apple", "tiny_class": "3", "tiny_pixels": ""}


@pytest.fixture
def double(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """A function: the pipeline of that name in float64, with another scheduler if one is given."""

    def get(source: str, scheduler: Any = None) -> Any:
        pipeline = load_pipeline(PipelineFolder(request.getfixturevalue(source), source), torch.float64)
        pipeline.set_progress_bar_config(disable=True)
        if source == "tiny_pixels":
            # Noise that random weights predict would make all pixels black or white, where gradients are zero.
            pipeline.scheduler.register_to_config(prediction_type="v_prediction")
        pipeline.scheduler = scheduler or pipeline.scheduler
        return pipeline

    return get


@pytest.fixture
def two_of() -> Callable[[str], list[Condition]]:
    """A function: two conditions for the pipeline of that name."""
    return lambda source: [Condition(TEXTS[source], seed) for seed in range(2)]


class Denoiser(nn.Module):
    """Takes a dict of conditions, and answers by a tuple or by name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.by_name = nn.Linear(3, 3), False

    def forward(self, sample: Tensor, timestep: Tensor | float, added: dict[str, Tensor]) -> Any:
        output = (self.layer(sample) + added["condition"]).tanh() * (1 + torch.as_tensor(timestep) / 1000)
        return {"sample": output} if self.by_name else (output,)


class Decoder:
    def decode(self, latents: Tensor) -> Any:
        return SimpleNamespace(sample=latents[..., None, None].transpose(1, 3))


class TwoCalls:
    """Asks for each guidance branch in a call of its own, and decodes one image at a time."""

    def __init__(self) -> None:
        self.unet = Denoiser().double()
        self.vae = Decoder()

    @torch.no_grad()
    def __call__(
        self, batch_size: int, generator: Any, num_inference_steps: int, guidance_scale: float, output_type: str = "np"
    ) -> Any:
        x = torch.cat([torch.randn(1, 3, generator=own, dtype=torch.float64) for own in generator])
        for step in range(num_inference_steps):
            timestep = 1000 * (1 - step / num_inference_steps)
            empty, full = (self._answer(x, timestep, condition) for condition in (0.0, 1.0))
            x = x - (empty + guidance_scale * (full - empty)) / num_inference_steps
        images = [self.vae.decode(own[None]).sample for own in x]
        return SimpleNamespace(images=torch.cat(images).numpy())

    def _answer(self, x: Tensor, timestep: float, condition: float) -> Tensor:
        output = self.unet(x, timestep, added={"condition": torch.full((3,), condition, dtype=x.dtype)})
        return output["sample"] if isinstance(output, dict) else output[0]


@pytest.fixture
def two_calls() -> Any:
    """A pipeline that takes nothing."""
    return TwoCalls()
