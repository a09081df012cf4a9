"""Calls of a denoiser are recorded once for each form of arguments, and answer as the denoiser does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from diffpress.export.runtime import StepClock, attach_clock_, call_graphs
from diffpress.export.runtime.call_graphs import GraphedForward
from diffpress.export.runtime.forwards import set_forward


class Denoiser(nn.Module):
    """What it answers depends on all that it is given, on its weight and on the step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0]), requires_grad=False)
        self.clock = StepClock([900.0, 500.0, 100.0])
        attach_clock_(self, self.clock)

    def forward(
        self, sample: Tensor, timestep: Tensor, scale: float = 1.0, conditions: Any = None
    ) -> dict[str, Tensor]:
        table = torch.tensor([1.0, 2.0, 8.0])
        added = 0 if conditions is None else conditions["text"].sum()
        return {"sample": sample * self.weight * scale * self.clock.select(table) + added}


class Recorder:
    """In the place of CUDA graphs: replays compute again, with what lies in the same memory."""

    def __init__(self) -> None:
        self.recorded = 0

    def __call__(self, call: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
        assert device == torch.device("cpu")
        self.recorded += 1
        output = call()

        def replay() -> None:
            for place, value in zip(tree_flatten(output)[0], tree_flatten(call())[0], strict=True):
                place.copy_(value)

        return output, replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(call_graphs, "record", recorder)
    return recorder


@pytest.fixture
def denoiser() -> Denoiser:
    """Its forward answers by graphs."""
    denoiser = Denoiser()
    set_forward(denoiser, GraphedForward(denoiser, denoiser.forward))
    return denoiser


def test_one_graph_answers_for_every_step_and_input(recorder: Recorder, denoiser: Denoiser) -> None:
    plain = Denoiser()
    for timestep in (900.0, 700.0, 100.0):
        given = torch.randn(2, 3), torch.tensor(timestep), 0.5, {"text": torch.randn(4)}
        assert torch.equal(denoiser(*given)["sample"], plain(*given)["sample"])
    assert recorder.recorded == 1


def test_what_was_answered_stays(recorder: Recorder, denoiser: Denoiser) -> None:
    first = denoiser(torch.ones(2), torch.tensor(900.0))["sample"]
    denoiser(torch.zeros(2), torch.tensor(900.0))
    assert first.tolist() == [2, 2]
    assert recorder.recorded == 1


@pytest.mark.parametrize(
    "other",
    [
        {"sample": torch.ones(3)},
        {"sample": torch.ones(2, dtype=torch.double)},
        {"scale": 2.0},
        {"conditions": {"text": torch.ones(1)}},
        {"timestep": torch.tensor([900.0])},
    ],
    ids=["shape", "dtype", "number", "argument", "form of the time step"],
)
def test_another_form_is_another_graph(recorder: Recorder, denoiser: Denoiser, other: dict[str, Any]) -> None:
    given = {"sample": torch.ones(2), "timestep": torch.tensor(900.0)}
    for each in (given, given | other, given, given | other):
        assert torch.equal(denoiser(**each)["sample"], Denoiser()(**each)["sample"])
    assert recorder.recorded == 2


def test_weights_that_lie_elsewhere_are_recorded_anew(recorder: Recorder, denoiser: Denoiser) -> None:
    given = torch.ones(2), torch.tensor(900.0)
    denoiser(*given)
    denoiser.weight.data = torch.tensor([3.0])
    assert denoiser(*given)["sample"].tolist() == [3, 3]
    assert recorder.recorded == 2


def test_the_graphs_asked_for_last_are_kept(
    recorder: Recorder, denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call_graphs, "MOST", 2)
    for size in (1, 2, 1, 3, 1, 2):
        denoiser(torch.ones(size), torch.tensor(900.0))
    # 2 was asked for longest ago when 3 came.
    assert recorder.recorded == 4


def test_learning_is_not_recorded(recorder: Recorder, denoiser: Denoiser) -> None:
    denoiser.weight.requires_grad_()
    denoiser(torch.ones(2), torch.tensor(900.0))["sample"].sum().backward()
    assert denoiser.weight.grad is not None
    assert recorder.recorded == 0


def test_inference_mode_and_what_comes_after_share_a_graph(recorder: Recorder, denoiser: Denoiser) -> None:
    for context in (torch.inference_mode, torch.no_grad):
        with context():
            assert denoiser(torch.ones(2), torch.tensor(900.0))["sample"].tolist() == [2, 2]
    assert recorder.recorded == 1


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["copy", "pickle"]
)
def test_a_copy_has_its_own_forward(
    recorder: Recorder, denoiser: Denoiser, copied: Callable[[Denoiser], Denoiser]
) -> None:
    given = torch.ones(2), torch.tensor(900.0)
    denoiser(*given)
    other = copied(denoiser)
    other.weight.fill_(5)
    assert other(*given)["sample"].tolist() == [5, 5]
    assert denoiser(*given)["sample"].tolist() == [2, 2]
    assert recorder.recorded == 1
