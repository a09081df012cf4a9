"""A loaded denoiser may be called by several threads, and may lie on disk between the calls of its blocks."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffpress.export.artifact import load_pipeline
from diffpress.export.folder import PipelineFolder

STEPS = [900.0, 600.0, 300.0, 0.0]


@pytest.fixture
def packed(tiny_class: Path, pack_all: Callable[..., Any], edited: Callable[..., nn.Module]) -> nn.Module:
    """A transformer in W8A8 whose activation scales differ from step to step."""
    transformer = load_pipeline(PipelineFolder(tiny_class, "tiny")).transformer
    return edited(transformer, pack_all(transformer, "transformer", 8, 8, len(STEPS)), STEPS)


def inputs(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([seed % 10, 3])


@torch.no_grad()
def generate(denoiser: nn.Module, seed: int) -> list[Tensor]:
    """What the denoiser answers at every step, each fed with the answer before."""
    sample, labels = inputs(seed)
    answers = []
    for timestep in STEPS:
        sample = denoiser(sample, timestep=torch.full((2,), timestep), class_labels=labels, return_dict=False)[0]
        answers.append(sample)
    return answers


def test_threads_give_what_one_after_the_other_gives(packed: nn.Module) -> None:
    expected = [generate(packed, seed) for seed in range(8)]
    meet = threading.Barrier(4)

    def wait(*_: Any) -> None:
        # All threads are inside of the denoiser, past its clock, before any layer runs.
        meet.wait(timeout=60)

    packed.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: generate(packed, seed), range(8)))
    for own, other in zip(found, expected, strict=True):
        assert all(torch.equal(left, right) for left, right in zip(own, other, strict=True))


def test_two_interleaved_generations_equal_the_sequential_ones(packed: nn.Module) -> None:
    expected = [generate(packed, seed) for seed in (0, 1)]
    samples = [inputs(0)[0], inputs(1)[0]]
    # The second runs three steps behind the first.
    for call in range(len(STEPS) + 3):
        for run, step in ((0, call), (1, call - 3)):
            if 0 <= step < len(STEPS):
                with torch.no_grad():
                    samples[run] = packed(
                        samples[run],
                        timestep=torch.full((2,), STEPS[step]),
                        class_labels=inputs(run)[1],
                        return_dict=False,
                    )[0]
                assert torch.equal(samples[run], expected[run][step])


def test_group_offload_to_disk_changes_nothing(
    tiny_text: Path, pack_all: Callable[..., Any], edited: Callable[..., nn.Module], tmp_path: Path
) -> None:
    unet = load_pipeline(PipelineFolder(tiny_text, "tiny")).unet
    edited(unet, pack_all(unet, "unet", 8, 8, len(STEPS)), STEPS)

    @torch.no_grad()
    def answers(model: Any) -> list[Tensor]:
        sample, states = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(2, 7, 16)
        return [model(sample, timestep, states, return_dict=False)[0] for timestep in STEPS]

    expected, device = answers(copy.deepcopy(unet)), torch.device("cpu")
    unet.enable_group_offload(
        onload_device=device,
        offload_device=device,
        offload_type="leaf_level",
        offload_to_disk_path=str(tmp_path),
    )
    found = answers(unet)
    assert list(tmp_path.iterdir()), "nothing was put on disk"
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))
