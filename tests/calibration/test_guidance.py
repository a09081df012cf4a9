"""How a pipeline combines what its denoiser answers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffpress.calibration.conditions import Condition, conditions
from diffpress.calibration.examples import Examples
from diffpress.calibration.guidance import Guidance, find_guidance
from diffpress.calibration.sampling import Sampling
from diffpress.calibration.trajectory import Trajectories, record
from diffpress.export.artifact import load_pipeline
from diffpress.export.folder import PipelineFolder

HALF_UNIT = torch.finfo(torch.float32).eps / 2


def tolerance(runs: Trajectories, scale: float, parts: int) -> float:
    """How far the solution may be off: the rounding of what was solved for, over the smallest singular value.

    What the scheduler was given is rounded in float32 after a difference, a product and a sum; the solution is too.
    """
    worst = 0.0
    for step in range(len(runs.timesteps)):
        calls = [call for call in runs.calls() if call.step == step]
        columns = [call.output.double().unflatten(0, (parts, -1)).flatten(1).t() for call in calls]
        matrix = torch.cat(columns)
        rounding = 3 * HALF_UNIT * (1 + 2 * abs(scale)) * float(matrix.norm())
        worst = max(worst, rounding / float(torch.linalg.svdvals(matrix)[-1]))
    return worst + HALF_UNIT * (1 + abs(scale))


def recorded(folder: Path, scale: float, into: Path) -> Trajectories:
    pipeline = load_pipeline(PipelineFolder(folder, "x"))
    return record(pipeline, conditions(pipeline, "builtin", 4, 0), Sampling(3, scale), into, batch=2)


def table(guidance: Guidance) -> Tensor:
    """[S, parts] where guidance takes one call a step and as many parts at each."""
    assert list(guidance.weights) == [(step, 0) for step in range(len(guidance.weights))]
    return torch.stack(list(guidance.weights.values()))


@pytest.mark.parametrize("scale", [3.0, 7.5, 0.5])
def test_a_prompts_guidance_is_found(scale: float, tiny_text: Path, tmp_path: Path) -> None:
    """Without the prompt first, with it second. A scale of at most one makes one part of it."""
    runs = recorded(tiny_text, scale, tmp_path)
    guidance = find_guidance(runs)
    assert guidance is not None
    assert guidance.channels == 4
    expected = torch.tensor([1 - scale, scale] if scale > 1 else [1.0]).expand(3, -1)
    assert (table(guidance) - expected).abs().max() <= tolerance(runs, scale, expected.shape[1])


def test_a_labels_guidance_is_found(tiny_class: Path, tmp_path: Path) -> None:
    """With the label first, without it second; the scheduler is given both halves, which are the same."""
    runs = recorded(tiny_class, 3.0, tmp_path)
    guidance = find_guidance(runs)
    assert guidance is not None
    expected = torch.tensor([3.0, -2.0]).expand(3, 2)
    assert (table(guidance) - expected).abs().max() <= tolerance(runs, 3.0, 2)


@pytest.mark.parametrize("source", ["tiny_pixels", "tiny_class"])
def test_without_guidance_the_output_is_taken_as_it_is(
    source: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    guidance = find_guidance(recorded(request.getfixturevalue(source), 1.0, tmp_path))
    assert guidance is not None
    assert torch.equal(table(guidance), torch.ones(3, 1))


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 3, 1)

    def forward(self, sample: Tensor, timestep: Tensor | float, return_dict: bool = True) -> Any:
        output = self.layer(sample).sin()
        return SimpleNamespace(sample=output) if return_dict else (output,)


class Scheduler:
    def set_timesteps(self, number: int) -> None:
        """Has none."""

    def step(self, model_output: Tensor, timestep: float, sample: Tensor) -> Tensor:
        return sample - 0.1 * model_output[:, :2]


class Pipeline:
    """Combines the parts of its denoiser's answers as told, channels that the scheduler is not given left out."""

    def __init__(self, parts: int, combine: Callable[[Tensor, int], Tensor], calls: int = 1) -> None:
        torch.manual_seed(0)
        self.unet, self.scheduler = Denoiser(), Scheduler()
        self.parts, self.combine, self.calls = parts, combine, calls

    def __call__(self, batch_size: int, generator: Any, num_inference_steps: int = 3, output_type: str = "np") -> Any:
        x = torch.cat([torch.randn(1, 2, 4, 4, generator=own) for own in generator])
        for step in range(num_inference_steps):
            fed = torch.cat([x + part for part in range(self.parts)])
            answers = torch.cat([self.unet(share, 100 - step).sample for share in fed.chunk(self.calls)])
            guided = self.combine(answers[:, :2].unflatten(0, (self.parts, -1)), step)
            x = self.scheduler.step(guided, 100 - step, x)
        return SimpleNamespace(images=np.zeros((batch_size, 2, 2, 1), np.float32))


def fake(pipeline: Pipeline, into: Path) -> Trajectories:
    return record(pipeline, [Condition("", seed) for seed in range(4)], Sampling(), into, batch=2)


def weighted(*rows: list[float]) -> Callable[[Tensor, int], Tensor]:
    """A weighted sum of the parts, with weights of its own at each step."""
    return lambda parts, step: torch.einsum("p,p...->...", torch.tensor(rows[step % len(rows)]), parts)


@pytest.mark.parametrize(
    "rows", [[[-1.0, 2.0]], [[0.5, 4.0, -3.5]], [[-1.0, 2.0], [0.0, 1.0], [-4.0, 5.0]]], ids=["two", "three", "a step"]
)
def test_any_weighted_sum_is_found(rows: list[list[float]], tmp_path: Path) -> None:
    runs = fake(Pipeline(len(rows[0]), weighted(*rows)), tmp_path)
    guidance = find_guidance(runs)
    assert guidance is not None
    assert guidance.channels == 2
    expected = torch.tensor([rows[step % len(rows)] for step in range(3)])
    seen = Seen(runs)
    largest = float(expected.abs().max())
    assert (table(guidance) - expected).abs().max() <= tolerance(seen, largest, len(rows[0]))  # type: ignore[arg-type]


class Seen:
    """Recorded runs with the channels only that the scheduler is given."""

    def __init__(self, runs: Trajectories) -> None:
        self.timesteps = runs.timesteps
        self.own = [call._replace(output=call.output[:, :2]) for call in runs.calls()]

    def calls(self) -> list[Any]:
        return self.own


def rescaled(parts: Tensor, _: int) -> Tensor:
    """Every image brought back to the spread of its conditional part, as guidance_rescale does."""
    guided = parts[0] + 3 * (parts[1] - parts[0])
    return guided * parts[1].std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)


def swapped(parts: Tensor, _: int) -> Tensor:
    """Something that mixes channels."""
    return (parts[0] + 3 * (parts[1] - parts[0])).flip(1)


@pytest.mark.parametrize("combine", [rescaled, swapped], ids=["rescaled", "mixed channels"])
def test_what_is_no_weighted_sum_is_not_taken_for_one(combine: Callable[[Tensor, int], Tensor], tmp_path: Path) -> None:
    assert find_guidance(fake(Pipeline(2, combine), tmp_path)) is None


@pytest.mark.parametrize("parts", [2, 4])
def test_guidance_in_two_calls_is_found(parts: int, tmp_path: Path) -> None:
    """Each call has weights of its own, and what the calls of a step add up to is what the scheduler was given."""
    row = [-1.0, 2.0, 0.5, -0.5][:parts]
    runs = fake(Pipeline(parts, weighted(row), calls=2), tmp_path)
    calls = list(runs.calls(runs.shards[:1]))
    assert [call.branch for call in calls] == [0, 1] * 3
    assert [call.guided is None for call in calls] == [True, False] * 3
    guidance = find_guidance(runs)
    assert guidance is not None
    check_combined(guidance, runs)
    assert {len(own) for own in guidance.weights.values()} == {parts // 2}


class OnAnInterval(Pipeline):
    """Guides at the middle step only, in one call of two parts or in two calls."""

    def __init__(self, calls: int) -> None:
        super().__init__(1, weighted([1.0]))
        self.guided_calls = calls

    def __call__(self, batch_size: int, generator: Any, num_inference_steps: int = 3, output_type: str = "np") -> Any:
        x = torch.cat([torch.randn(1, 2, 4, 4, generator=own) for own in generator])
        for step in range(num_inference_steps):
            guided = step == 1
            fed = torch.cat([x, x + 1]) if guided else x
            shares = fed.chunk(self.guided_calls if guided else 1)
            answers = torch.cat([self.unet(share, 100 - step).sample for share in shares])[:, :2]
            first, *rest = answers.split(len(x))
            x = self.scheduler.step(3 * first - 2 * rest[0] if rest else first, 100 - step, x)
        return SimpleNamespace(images=np.zeros((batch_size, 2, 2, 1), np.float32))


@pytest.mark.parametrize("calls", [1, 2])
def test_guidance_on_an_interval_of_steps_is_found(calls: int, tmp_path: Path) -> None:
    runs = fake(OnAnInterval(calls), tmp_path)
    guidance = find_guidance(runs)
    assert guidance is not None
    shapes = {place: len(own) for place, own in guidance.weights.items()}
    assert shapes == ({(0, 0): 1, (1, 0): 2, (2, 0): 1} if calls == 1 else {(0, 0): 1, (1, 0): 1, (1, 1): 1, (2, 0): 1})
    check_combined(guidance, runs)


@pytest.mark.parametrize("calls", [1, 2])
def test_a_batch_is_of_one_form_where_steps_differ(calls: int, tmp_path: Path) -> None:
    runs = fake(OnAnInterval(calls), tmp_path)
    guidance, examples = find_guidance(runs), Examples(runs, runs.shards)
    assert guidance is not None
    # One call of two parts cannot be laid beside one of one; two calls of one can.
    assert [sorted(set(examples.steps[list(chain(*own))].tolist())) for own in examples.runs] == (
        [[0, 2], [1]] if calls == 1 else [[0, 1, 2]]
    )
    for own in examples.runs:
        batch = examples.batch(list(chain(*own)))
        assert guidance.combine(batch.output, batch.steps, batch.branches).shape == (len(batch.steps), 2, 4, 4)


def check_combined(guidance: Guidance, runs: Trajectories) -> None:
    """What the calls of each step combine to is what the scheduler was given."""
    count, largest = runs.images(runs.shards[0]), max(float(own.abs().max()) for own in guidance.weights.values())
    total, size = torch.tensor(0.0), 0.0
    for call in runs.calls():
        steps, branches = torch.full((count,), call.step), torch.full((count,), call.branch)
        total = total + guidance.combine(call.output, steps, branches)
        size += float(call.output.norm())
        if call.guided is not None:
            # Least squares leave no more than the true weights would: two roundings a part where the scheduler's was
            # made, three here (the weight, the product, the sum), each of at most half a unit of a part times its weight.
            assert (total - call.guided).norm() <= 5 * HALF_UNIT * largest * size * len(call.output)
            total, size = torch.tensor(0.0), 0.0


def test_combine_weights_parts_by_the_step_of_each_picture() -> None:
    weights = torch.tensor([[-1.0, 2.0], [-4.0, 5.0], [0.0, 1.0]])
    guidance = Guidance({(step, 0): own for step, own in enumerate(weights)}, 2)
    output = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([2, 0, 1])
    combined = guidance.combine(output, steps, torch.zeros(3, dtype=torch.int64))
    assert combined.shape == (3, 2, 4, 4)
    for image, step in enumerate(steps.tolist()):
        expected = weights[step, 0] * output[image, :2] + weights[step, 1] * output[3 + image, :2]
        assert torch.equal(combined[image], expected)


def test_combine_gives_what_the_scheduler_was_given(tiny_text: Path, tmp_path: Path) -> None:
    runs = recorded(tiny_text, 3.0, tmp_path)
    guidance = find_guidance(runs)
    assert guidance is not None
    for call in runs.calls():
        assert call.guided is not None
        steps = torch.full((len(call.guided),), call.step)
        error = (guidance.combine(call.output, steps, torch.zeros_like(steps)) - call.guided).abs().max()
        # Weights off by so much, and the three roundings of either side.
        bound = (2 * tolerance(runs, 3.0, 2) + 6 * HALF_UNIT * 5) * call.output.abs().max()
        assert error <= bound
