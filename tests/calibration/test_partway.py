"""A part of the denoiser, seen from inside a call that goes no further."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor, nn

from diffpress.calibration.conditions import Condition
from diffpress.calibration.partway import arguments_of, call_order, output_of, scheduler_in_use
from diffpress.calibration.sampling import Sampling
from diffpress.export.artifact import load_pipeline
from diffpress.export.folder import PipelineFolder


class Denoiser(nn.Module):
    """Calls its parts in another order than they are registered in, and hands a context around by name."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Identity()
        self.last, self.first, self.middle = (Part() for _ in range(3))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        x = self.first(sample, context=timestep)
        return (self.last(self.middle(x, context=timestep)[0])[0] * self.scale,)


class Part(nn.Module):
    def forward(self, x: Tensor, context: Any = None) -> Any:
        return (x + 1, None) if context is not None and x.ndim == 1 else (x * 2,)


@pytest.fixture
def calls() -> list[str]:
    return []


@pytest.fixture
def denoiser(calls: list[str]) -> Denoiser:
    """Writes down which of its parts answer."""
    made = Denoiser()
    made.first.forward = lambda x, context: x + 1  # type: ignore[method-assign]
    for name in ("first", "middle", "last"):
        made.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))  # type: ignore[misc]
    return made


INPUTS = {"sample": torch.zeros(2), "timestep": torch.tensor(3.0)}


def test_arguments_end_the_call_before_the_module(denoiser: Denoiser, calls: list[str]) -> None:
    found = arguments_of(denoiser, "middle", INPUTS, torch.float32)
    assert torch.equal(found.positional[0], torch.ones(2))
    assert found.named == {"context": INPUTS["timestep"]}
    assert calls == ["first"]


def test_an_output_ends_the_call_behind_the_module(denoiser: Denoiser, calls: list[str]) -> None:
    found = output_of(denoiser, "middle", INPUTS, torch.float32)
    assert torch.equal(found[0], torch.full((2,), 2.0))
    assert found[1] is None
    assert calls == ["first", "middle"]


def test_order_is_that_of_the_calls(denoiser: Denoiser) -> None:
    names = ["unused", "last", "first", "middle"]
    assert call_order(denoiser, names, INPUTS, torch.float32) == ["first", "middle", "last"]


def test_hooks_are_gone_afterwards_and_errors_pass(denoiser: Denoiser, calls: list[str]) -> None:
    output_of(denoiser, "first", INPUTS, torch.float32)
    assert denoiser(INPUTS["sample"], INPUTS["timestep"])[0].shape == (2,)
    with pytest.raises(TypeError):
        arguments_of(denoiser, "middle", {"nothing": torch.zeros(1)}, torch.float32)
    assert not denoiser.middle._forward_pre_hooks


def test_the_scheduler_in_use_is_set_up_by_the_pipeline_and_has_made_no_step(tiny_class: Path) -> None:
    pipeline = load_pipeline(PipelineFolder(tiny_class, "tiny"))
    asked: list[None] = []
    handle = pipeline.transformer.register_forward_hook(lambda *_: asked.append(None))
    pipeline.scheduler = DPMSolverMultistepScheduler()
    found = scheduler_in_use(pipeline, Condition("1", 0), Sampling(3))
    handle.remove()
    assert not asked
    assert found is not pipeline.scheduler
    pipeline.scheduler.set_timesteps(3)
    assert found.timesteps.tolist() == pipeline.scheduler.timesteps.tolist()
    assert found.lower_order_nums == 0
    assert not pipeline.transformer._forward_pre_hooks
