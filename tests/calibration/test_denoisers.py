"""Pipelines with several denoisers: which parts they are, and what is recorded of each."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffpress.calibration.conditions import Condition
from diffpress.calibration.examples import Examples
from diffpress.calibration.sampling import Sampling, denoiser_of, denoisers_of, replay
from diffpress.calibration.schedulers import watch_guided
from diffpress.calibration.trajectory import Trajectories, record
from diffpress.export.errors import UnsupportedModelError

TIMES = (0.9, 0.6, 0.3, 0.1)
"""The first expert answers at the first two, the second at the others."""
TWO = [Condition("", 0), Condition("", 1)]


class Expert(nn.Module):
    """Takes its samples in a list, and answers with one; `residuals` are added."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: list[Tensor], t: Tensor, residuals: tuple[Tensor, ...], shapes: list[int]) -> Any:
        return ([self.layer(own) + t[index] + residuals[0][index] for index, own in enumerate(x)], None)


class Guide(nn.Module):
    """Steers an expert."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, sample: Tensor, timestep: Tensor) -> Any:
        return SimpleNamespace(residuals=(self.layer(sample),))


class Scheduler:
    def set_timesteps(self) -> None: ...

    def step(self, model_output: Tensor, sample: Tensor, generator: Any = None) -> Tensor:
        return sample - model_output


class Pipeline:
    """Asks a guide and one of two experts at every step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.guide, self.low, self.high = Guide(), Expert(), Expert()
        self.vae_like, self.scheduler = nn.Linear(3, 3), Scheduler()

    def __call__(self, batch_size: int, generator: Any, output_type: str = "np") -> Any:
        x = torch.cat([torch.randn(1, 3, generator=own) for own in generator])
        for time in TIMES:
            t = torch.full((batch_size,), time)
            residuals = self.guide(x, torch.tensor(time)).residuals
            expert = self.high if time > 0.5 else self.low
            answer = torch.stack(expert(list(x), t=t, residuals=residuals, shapes=list(range(batch_size)))[0])
            x = self.scheduler.step(answer, x)
        return SimpleNamespace(images=np.zeros((batch_size, 2, 2, 1), np.float32))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Trajectories]:
    pipeline = Pipeline()
    return pipeline, record(pipeline, TWO, Sampling(), tmp_path_factory.mktemp("runs"), batch=2)


def test_denoisers_are_the_parts_that_are_told_the_time_step() -> None:
    pipeline = Pipeline()
    assert list(denoisers_of(pipeline)) == ["guide", "low", "high"]
    with pytest.raises(UnsupportedModelError, match=r"Pipeline has several parts that .* \(guide, low, high\)"):
        denoiser_of(pipeline)
    pipeline.high = torch.compile(pipeline.high)  # type: ignore[assignment]
    assert denoisers_of(pipeline)["high"] is pipeline.high
    del pipeline.high, pipeline.low
    assert denoiser_of(pipeline) is pipeline.guide


def test_each_has_time_steps_calls_and_updates_of_its_own(recorded: tuple[Any, Trajectories]) -> None:
    pipeline, runs = recorded
    assert runs.parts == ["guide", "high", "low"]
    assert runs.answering == ["high", "low"]
    times = {part: runs.of(part).timesteps for part in runs.parts}
    expected = {"guide": TIMES, "high": TIMES[:2], "low": TIMES[2:]}
    assert times == {part: pytest.approx(list(own)) for part, own in expected.items()}
    assert {part: runs.of(part).updates for part in runs.parts} == {"guide": [], "high": [0, 1], "low": [0, 1]}
    for part, own in expected.items():
        calls = list(runs.of(part).calls())
        assert [(call.part, call.step, call.branch) for call in calls] == [(part, step, 0) for step in range(len(own))]
        for index, call in enumerate(calls):
            assert torch.equal(runs.of(part).call(runs.shards[0], index).output, call.output)
            assert torch.equal(replay(getattr(pipeline, part), call), call.output)
            assert (call.guided is None) == (part == "guide")


def test_one_alone_can_be_recorded(recorded: tuple[Any, Trajectories], tmp_path: Path) -> None:
    pipeline, runs = recorded
    alone = record(pipeline, TWO, Sampling(), tmp_path, batch=2, only="low")
    assert (alone.parts, alone.updates, alone.timesteps) == (["low"], [0, 1], runs.of("low").timesteps)
    assert all(
        torch.equal(own.output, other.output) for own, other in zip(alone.calls(), runs.of("low").calls(), strict=True)
    )


def test_lists_with_an_entry_an_image_are_shared_out_and_put_together(recorded: tuple[Any, Trajectories]) -> None:
    """Example 1 is the second image at the first step, example 2 the first one at the second."""
    pipeline, runs = recorded
    own = runs.of("high")
    calls = list(own.calls())
    batch = Examples(own, own.shards).batch([1, 2])
    given = batch.inputs.given(lambda _, value: value)  # type: ignore[attr-defined]
    assert [list(x) for x in given["x"]] == [list(calls[0].inputs["x/1"]), list(calls[1].inputs["x/0"])]
    assert given["shapes"] == [1, 0]
    assert given["t"].tolist() == pytest.approx(TIMES[:2])
    expected = torch.stack([calls[0].output[1], calls[1].output[0]])
    assert torch.equal(batch.output, expected)
    # Each row is computed alone, so that nothing is rounded otherwise.
    assert torch.equal(torch.stack(pipeline.high(**given)[0]), expected)


def test_a_copy_of_a_watched_scheduler_has_steps_of_its_own() -> None:
    pipeline, seen = Pipeline(), list[Tensor]()
    with watch_guided(pipeline, seen.append):
        copied = copy.deepcopy(pipeline.scheduler)
        assert copied.step(torch.ones(1), torch.ones(1)) == 0
        assert copied.step.__self__ is copied
        assert not seen
        pipeline.scheduler.step(torch.ones(1), torch.ones(1))
    assert len(seen) == 1
    assert "step" not in vars(pipeline.scheduler)


class Wanders(Pipeline):
    """Goes back to a time step between two others."""

    def __call__(self, batch_size: int, generator: Any, output_type: str = "np") -> Any:
        for time in (0.9, 0.1, 0.5):
            self.guide(torch.ones(1, 3), torch.tensor(time))
        return SimpleNamespace(images=np.zeros((batch_size, 2, 2, 1), np.float32))


def test_time_steps_without_an_order_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"Wanders asks its guide .* neither fall nor rise \(0.9, 0.1, 0.5\)"
    ):
        record(Wanders(), TWO, Sampling(), tmp_path)
