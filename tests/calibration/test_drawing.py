"""Noise, and calls that make one output at a time."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffpress.calibration.conditions import Condition
from diffpress.calibration.media import StandIn
from diffpress.calibration.sampling import Sampling, groups_of, sample
from diffpress.export.errors import UserError


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, sample: Tensor, timestep: float) -> tuple[Tensor]:
        return (self.layer(sample),)


class Scheduler:
    """Draws from no generator, and keeps where its noise comes from."""

    noise_sampler: Tensor | None = None

    def set_timesteps(self, steps: int) -> None: ...

    def step(self, output: Tensor) -> Tensor:
        if self.noise_sampler is None:
            self.noise_sampler = torch.rand(())
        return output + self.noise_sampler


class OneVideo:
    """Takes one prompt; its frames depend on what was drawn from no generator."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.unet, self.scheduler = Denoiser(), Scheduler()
        self.prompts: list[str] = []

    def __call__(self, prompt: str, generator: torch.Generator, num_frames: int = 4, output_type: str = "np") -> Any:
        self.prompts.append(prompt)
        sample = torch.randn(1, num_frames, 2, 2, 3, generator=generator)
        sample = self.scheduler.step(self.unet(sample, 1.0)[0].detach())
        return SimpleNamespace(frames=sample.sigmoid().numpy())


def test_a_pipeline_that_takes_one_text_is_called_for_each() -> None:
    pipeline = OneVideo()
    made = sample(pipeline, [Condition("a", 0), Condition("b", 1)], Sampling())
    assert pipeline.prompts == ["a", "b"]
    assert (made.kind, tuple(made.images.shape)) == ("video", (2, 4, 3, 2, 2))
    assert torch.equal(made.latents, made.images)


def test_noise_from_no_generator_depends_on_the_seed_alone() -> None:
    pipeline, before = OneVideo(), torch.get_rng_state()
    first, other = (sample(pipeline, [Condition("a", seed)], Sampling()).images for seed in (0, 1))
    torch.rand(5)
    again = sample(OneVideo(), [Condition("a", 0)], Sampling()).images
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.set_rng_state(before)
    sample(pipeline, [Condition("a", 0)], Sampling())
    assert torch.equal(torch.get_rng_state(), before)


def test_it_is_not_the_generators_noise_once_more() -> None:
    drawn: list[Tensor] = []

    class Drawing(OneVideo):
        def __call__(self, prompt: str, generator: torch.Generator, output_type: str = "np") -> Any:
            drawn.extend((torch.randn(16, generator=generator), torch.randn(16)))
            return SimpleNamespace(frames=np.zeros((1, 2, 2, 2, 3)))

    sample(Drawing(), [Condition("a", 0)], Sampling())
    assert not torch.equal(*drawn)


class Listing(OneVideo):
    def __call__(self, prompt: list[str], generator: list[Any], image: Any = None, output_type: str = "np") -> Any: ...


@pytest.mark.parametrize(
    ("arguments", "shared", "sizes"),
    [
        ([{}, {}, {}], {}, [2, 1]),
        ([{}, {"image": StandIn("image", 0)}, {}], {}, [1, 1, 1]),
        ([{}, {}, {}], {"strength": 0.5}, [2, 1]),
        ([{}, {}, {}], {"image": StandIn("image", 0)}, [1, 1, 1]),
    ],
)
def test_calls_with_pictures_are_made_alone(
    arguments: Sequence[dict[str, Any]], shared: dict[str, Any], sizes: list[int]
) -> None:
    wanted = [Condition("a", seed, own) for seed, own in enumerate(arguments)]
    groups = groups_of(Listing(), wanted, Sampling(call=shared), 2)
    assert [len(group) for group in groups] == sizes
    assert [condition for group in groups for condition in group] == wanted


def test_a_package_that_a_pipeline_lacks_is_named() -> None:
    class Lacking(OneVideo):
        def __call__(self, prompt: str, output_type: str = "np") -> Any:
            # As pipelines do whose import of it was optional.
            exec("ftfy.fix_text(prompt)", {"__name__": "diffusers.pipelines.lacking"})

    with pytest.raises(UserError, match="the package ftfy is needed by Lacking and not installed: pip install ftfy"):
        sample(Lacking(), [Condition("a", 0)], Sampling())


def test_faults_of_ours_are_let_through() -> None:
    class Broken(OneVideo):
        def __call__(self, prompt: str, output_type: str = "np") -> Any:
            exec("raise ValueError('ours')", {"__name__": "diffpress.export.runtime.packed"})

    with pytest.raises(ValueError, match=r"^ours$"):
        sample(Broken(), [Condition("a", 0)], Sampling())


def test_outputs_of_other_sizes_are_refused() -> None:
    class Growing(OneVideo):
        def __call__(self, prompt: str, output_type: str = "np") -> Any:
            self.prompts.append(prompt)
            return SimpleNamespace(frames=np.zeros((1, 2, 2, 2 * len(self.prompts), 3)))

    with pytest.raises(UserError, match="outputs of different sizes"):
        sample(Growing(), [Condition("a", 0), Condition("a", 1)], Sampling())
