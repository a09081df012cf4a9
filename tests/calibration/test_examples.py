"""Single images out of recorded runs, put together anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffpress.calibration.conditions import conditions
from diffpress.calibration.examples import Examples
from diffpress.calibration.sampling import Call, Sampling, denoiser_of, sample, watch
from diffpress.calibration.trajectory import Form, Trajectories, record
from diffpress.export.artifact import load_pipeline
from diffpress.export.folder import PipelineFolder

SOURCES = {"tiny_text": 2, "tiny_class": 2, "tiny_pixels": 1}
"""Pipelines and how many parts guidance makes of a batch."""
STEPS, IMAGES = 3, 5


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Any, Trajectories]]:
    """A function: the pipeline of that name, and five recorded images, two a shard."""
    made: dict[str, tuple[Any, Trajectories]] = {}

    def get(name: str) -> tuple[Any, Trajectories]:
        if name not in made:
            pipeline = load_pipeline(PipelineFolder(request.getfixturevalue(name), name))
            wanted = conditions(pipeline, "builtin", IMAGES, 0)
            folder = tmp_path_factory.mktemp("examples")
            made[name] = pipeline, record(pipeline, wanted, Sampling(STEPS, 3.0), folder, batch=2)
        return made[name]

    return get


@pytest.mark.parametrize("source", SOURCES)
def test_there_is_one_example_a_picture_and_step(source: str, runs: Callable[[str], tuple[Any, Trajectories]]) -> None:
    _, recorded = runs(source)
    examples = Examples(recorded, recorded.shards)
    assert len(examples) == len(examples.steps) == STEPS * IMAGES
    assert examples.steps.bincount().tolist() == [IMAGES] * STEPS
    assert len(Examples(recorded, recorded.shards[2:])) == STEPS


@pytest.mark.parametrize("source", SOURCES)
def test_a_whole_call_is_put_together_as_the_pipeline_fed_it(
    source: str, runs: Callable[[str], tuple[Any, Trajectories]]
) -> None:
    """Both images of a step of a shard, in their order: every tensor comes back as it was, parts and all."""
    _, recorded = runs(source)
    examples, shard = Examples(recorded, recorded.shards), recorded.shards[0]
    for index, call in enumerate(recorded.calls([shard])):
        batch = examples.batch([2 * index, 2 * index + 1])
        assert torch.equal(batch.output, call.output)
        assert batch.steps.tolist() == [call.step] * 2
        assert batch.inputs.keys() == call.inputs.keys()
        for name, value in call.inputs.items():
            expected = value.flatten()[:1].expand(len(call.output)) if name == "timestep" else value
            assert torch.equal(batch.inputs[name], expected)


@pytest.mark.parametrize("source", SOURCES)
def test_mixed_batches_hold_what_each_picture_was_fed(
    source: str, runs: Callable[[str], tuple[Any, Trajectories]]
) -> None:
    _, recorded = runs(source)
    parts = SOURCES[source]
    examples = Examples(recorded, recorded.shards)
    # Other steps, other shards, other orders, one twice.
    indices = [14, 0, 5, 7, 5, 12]
    batch = examples.batch(indices)
    assert batch.steps.tolist() == examples.steps[indices].tolist()
    assert len(batch.steps.unique()) > 1
    assert len(batch.output) == parts * len(indices)
    for place, index in enumerate(indices):
        alone = examples.batch([index])
        rows = [part * len(indices) + place for part in range(parts)]
        assert torch.equal(batch.output[rows], alone.output)
        for name, value in alone.inputs.items():
            assert torch.equal(batch.inputs[name][rows], value)
    # Every row is asked at its own step.
    times = torch.tensor(recorded.timesteps)[batch.steps].repeat(parts)
    assert torch.equal(batch.inputs["timestep"].float(), times)


@pytest.mark.parametrize("source", SOURCES)
def test_denoisers_answer_to_mixed_batches_as_they_did_when_recorded(
    source: str, runs: Callable[[str], tuple[Any, Trajectories]]
) -> None:
    pipeline, recorded = runs(source)
    denoiser = denoiser_of(pipeline)
    batch = Examples(recorded, recorded.shards).batch([14, 0, 5, 7])
    with torch.no_grad():
        answers = denoiser(**batch.inputs, return_dict=False)[0]
    layers = [module for module in denoiser.modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))]
    longest = max(layer.weight[0].numel() for layer in layers)
    # Every layer may add its longest sum in another order.
    tolerance = len(layers) * longest * torch.finfo(torch.float32).eps * float(batch.output.abs().max())
    assert (answers - batch.output).abs().max() <= tolerance


@pytest.mark.parametrize("source", ["tiny_text", "tiny_class"])
def test_a_single_picture_has_the_parts_the_pipeline_gives_it(
    source: str, runs: Callable[[str], tuple[Any, Trajectories]]
) -> None:
    """Sampled alone, at the first step, where nothing has had time to round differently."""
    pipeline, recorded = runs(source)
    wanted = conditions(pipeline, "builtin", IMAGES, 0)
    calls: list[Call] = []
    with watch(pipeline, calls.append):
        sample(pipeline, wanted[3:4], Sampling(STEPS, 3.0))
    examples = Examples(recorded, recorded.shards)
    # The second shard's first call, its second image.
    batch = examples.batch([STEPS * 2 + 1])
    exact = {"sample", "hidden_states", "class_labels"} & batch.inputs.keys()
    assert exact
    for name in exact:
        assert torch.equal(batch.inputs[name], calls[0].inputs[name])


def test_inputs_without_a_batch_axis_are_the_first_examples(tmp_path: Path) -> None:
    """As positions are: here, a length that is none of a batch."""
    recorded = FakeRuns()
    batch = Examples(recorded, [tmp_path]).batch([0, 3])  # type: ignore[arg-type]
    assert torch.equal(batch.inputs["positions"], torch.arange(7.0))
    assert torch.equal(batch.inputs["scale"], torch.tensor(0.5))
    assert batch.inputs["x"].flatten().tolist() == [0, 1, 3, 4]
    assert batch.inputs["timestep"].tolist() == [10, 5, 10, 5]
    assert batch.steps.tolist() == [0, 1]


class FakeRuns:
    """Three images at two steps, in two parts; images are numbered on from 0, the second part's from 3."""

    def images(self, shard: Path) -> int:
        return 3

    def steps(self, shard: Path) -> list[int]:
        return [0, 1]

    def call(self, shard: Path, index: int) -> Call:
        x = torch.arange(6.0).view(6, 1) + index
        inputs = {"x": x, "positions": torch.arange(7.0) + index, "scale": torch.tensor(0.5 + index)}
        return Call({**inputs, "timestep": torch.tensor(10 - 5 * index)}, x, index)

    def forms(self, shard: Path) -> list[Form]:
        tensors = (("inputs.timestep", "I64", ()), ("inputs.x", "F32", (6, 1)), ("output", "F32", (6, 1)))
        return [Form(tensors, '{"timestep": null}')] * 2
