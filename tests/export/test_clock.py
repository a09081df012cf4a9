"""The step is told by the time step of the call."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from diffpress.export.runtime import StepClock, attach_clock_, find_timestep, time_argument, time_of, timestep_name
from diffpress.export.runtime.clock import TIMESTEPS

STEPS = [981.0, 500.0, 20.0]
TABLE = torch.tensor([1.0, 2.0, 8.0])


class Denoiser(nn.Module):
    """Answers with the entry of a table its clock points at."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = StepClock(STEPS)

    def forward(self, sample: Tensor, timestep: Tensor | float | None = None, scale: float = 1.0) -> Tensor:
        return self.clock.select(TABLE) * scale


@pytest.mark.parametrize(
    ("timestep", "expected"),
    [
        (981, 1.0),
        (500, 2.0),
        (20, 8.0),
        (740.5, 1.5),
        (260, 5.0),
        (140, 6.5),
        (999, 1.0),
        (0, 8.0),
        (torch.tensor(500), 2.0),
        (torch.tensor([20, 20], dtype=torch.int64), 8.0),
        (torch.tensor([[260.0]], dtype=torch.float64), 5.0),
    ],
    ids=str,
)
def test_known_steps_are_exact_and_others_interpolated_or_held(timestep: Tensor | float, expected: float) -> None:
    clock = StepClock(STEPS)
    clock.set(timestep)
    assert clock.select(TABLE).tolist() == [expected]
    assert clock.weights.sum() == 1


def test_every_step_of_a_long_table_is_one_hot() -> None:
    steps = torch.linspace(999, 1, 50).round().tolist()
    clock = StepClock(steps)
    for index, step in enumerate(steps):
        clock.set(step)
        assert torch.equal(clock.weights, torch.eye(50)[index])


@pytest.mark.parametrize("given", [0.9, torch.tensor(0.9), torch.tensor([0.9, 0.9], dtype=torch.double)], ids=repr)
def test_a_known_step_is_looked_up_not_interpolated(given: Tensor | float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = StepClock([1.0, 0.9, 0.1])
    monkeypatch.setattr("diffpress.export.runtime.clock.step_weights", lambda *_: pytest.fail("interpolated"))
    clock.set(given)
    assert clock.weights.tolist() == [0.0, 1.0, 0.0]
    assert clock.position == 1


def test_time_steps_between_zero_and_one() -> None:
    clock = StepClock([1.0, 0.75, 0.25])
    clock.set(0.5)
    assert clock.weights.tolist() == [0.0, 0.5, 0.5]


def test_one_step_holds_always() -> None:
    clock = StepClock([500])
    for timestep in (999, 500, 1):
        clock.set(timestep)
        assert clock.weights.tolist() == [1.0]


def test_stands_at_the_first_step_before_it_is_set_even_when_made_for_an_empty_model() -> None:
    with init_empty_weights(include_buffers=True):
        clock = StepClock(STEPS)
    assert clock.select(TABLE).tolist() == [1.0]


@pytest.mark.parametrize("steps", [[], [5, 5], [9, 5, 7], [5, 7, 6], [float("nan"), 1]], ids=str)
def test_steps_that_do_not_fall_are_refused(steps: list[float]) -> None:
    with pytest.raises(ValueError, match="timesteps must fall strictly"):
        StepClock(steps)


def test_find_timestep_positional_keyword_or_absent() -> None:
    denoiser, x = Denoiser(), torch.zeros(1)
    assert find_timestep(denoiser, (x, 7), {}) == 7
    assert find_timestep(denoiser, (x,), {"timestep": 8, "scale": 2.0}) == 8
    assert find_timestep(denoiser, (), {"timestep": 9, "sample": x}) == 9
    assert find_timestep(denoiser, (x,), {}) is None


def test_attached_clock_follows_the_calls_until_removed() -> None:
    denoiser, x = Denoiser(), torch.zeros(1)
    handle = attach_clock_(denoiser, denoiser.clock)
    assert denoiser(x, 500).item() == 2
    assert denoiser(x, timestep=20).item() == 8
    assert denoiser(x).item() == 8
    handle.remove()
    assert denoiser(x, 500).item() == 8


def test_a_deep_copy_has_a_clock_of_its_own() -> None:
    denoiser, x = Denoiser(), torch.zeros(1)
    attach_clock_(denoiser, denoiser.clock)
    denoiser(x, 500)
    twin = copy.deepcopy(denoiser)
    assert twin(x, 20).item() == 8
    assert denoiser.clock.select(TABLE).item() == 2


def test_zero_points_are_codes_of_eight_bits() -> None:
    clock = StepClock(STEPS)
    codes = [clock.select_code(table) for table in (TABLE + 0.3, -1000 * TABLE, 1000 * TABLE)]
    assert [code.tolist() for code in codes] == [[1], [-128], [127]]
    assert {code.dtype for code in codes} == {torch.int32}


def test_what_is_written_into_a_table_holds_at_once() -> None:
    clock, table = StepClock(STEPS), TABLE.clone()
    clock.set(500)
    table.mul_(2)
    assert clock.select(table).item() == 4


def test_time_steps_may_rise() -> None:
    clock = StepClock([0.0, 0.5, 1.0])
    for timestep, expected in ((0.25, 1.5), (0.5, 2.0), (0.75, 5.0), (2.0, 8.0), (-1.0, 1.0)):
        clock.set(timestep)
        assert clock.select(TABLE).item() == expected


@pytest.mark.parametrize("name", TIMESTEPS)
def test_the_time_step_is_known_by_any_of_its_names(name: str) -> None:
    namespace: dict[str, Any] = {}
    exec(f"def forward(self, sample, {name}=None): return {name}", namespace)
    denoiser = type("Denoiser", (nn.Module,), {"forward": namespace["forward"]})()
    assert timestep_name(denoiser) == name
    assert find_timestep(denoiser, (None, 7), {}) == 7
    assert find_timestep(denoiser, (None,), {name: 8}) == 8


def test_every_thread_is_at_its_own_step() -> None:
    """Four threads call one denoiser, each in step with the others, at other time steps than theirs."""
    denoiser, meet = Denoiser(), threading.Barrier(4)
    attach_clock_(denoiser, denoiser.clock)
    # After the clock has moved, all wait for each other before any table is read.
    denoiser.register_forward_pre_hook(lambda *_: meet.wait(timeout=60) and None)

    def entries(start: int) -> list[float]:
        return [denoiser(torch.zeros(1), STEPS[(start + call) % 3]).item() for call in range(30)]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(entries, range(4)))
    assert found == [[TABLE[(start + call) % 3].item() for call in range(30)] for start in range(4)]


def test_one_graph_of_a_block_serves_every_step() -> None:
    """The clock is set outside of blocks that are compiled one by one."""
    model, graphs = Denoiser(), []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model.forward, backend=backend, fullgraph=True, dynamic=False)
    for timestep, expected in zip((981, 500, 20, 260), (1.0, 2.0, 8.0, 5.0), strict=True):
        model.clock.set(timestep)
        assert compiled(torch.zeros(1)).item() == expected
    assert len(graphs) == 1


def test_layers_of_one_step_are_looked_up_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step asks for each table, a later one for all that the step before asked for."""
    clock, tables = StepClock(STEPS), [TABLE * factor for factor in (1, 2, 3)]
    looked_up: list[int] = []
    weighted = clock._weighted
    monkeypatch.setattr(clock, "_weighted", lambda stack: (looked_up.append(len(stack)), weighted(stack))[1])
    for timestep in (740.5, 260.0):
        clock.set(timestep)
        alone = [(table * clock.weights).sum(-1, keepdim=True) for table in tables]
        assert all(map(torch.equal, map(clock.select, tables), alone))
        codes = [entry.round().clamp(-128, 127).to(torch.int32) for entry in alone]
        assert all(map(torch.equal, map(clock.select_code, tables), codes))
    assert looked_up == [1, 1, 1, 1, 1, 1, 3, 3]


def test_a_table_that_changes_within_a_step_is_looked_up_anew() -> None:
    clock, table = StepClock(STEPS), TABLE.clone()
    clock.set(740.5)
    assert clock.select(table).tolist() == [1.5]
    table *= 2
    assert clock.select(table).tolist() == [3.0]
    assert clock.select_code(table).tolist() == [3]
    table += 1
    assert clock.select_code(table).tolist() == [4]


def test_tables_that_cannot_be_stacked_or_are_learned_are_looked_up_alone() -> None:
    clock, learned = StepClock(STEPS), TABLE.clone().requires_grad_()
    others = [TABLE, TABLE.double(), learned]
    for timestep in (740.5, 740.5):
        clock.set(timestep)
        assert [clock.select(table).item() for table in others] == [1.5, 1.5, 1.5]
    clock.select(learned).backward()
    assert learned.grad is not None
    assert learned.grad.tolist() == [0.5, 0.5, 0.0]
    with torch.inference_mode():
        clock.set(740.5)
        assert clock.select(TABLE * 2).tolist() == [3.0]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("timestep", "timestep_cond", "sigma"), "timestep"),
        (("sigma", "t"), "t"),
        (("timestep_text", "timestep_img"), "timestep_text"),
        (("x", "noise_time"), "noise_time"),
        (("sample", "times", "text_time_embeds"), None),
    ],
)
def test_of_several_arguments_the_plainest_tells_the_time_step(names: tuple[str, ...], found: str | None) -> None:
    assert time_argument(names) == found


def test_the_time_step_of_most_parts_of_an_image_counts() -> None:
    """The first picture of a video may be given, at a time step of its own."""
    clock = StepClock([900.0, 400.0, 100.0])
    clock.set(torch.tensor([[0.0, 400.0, 400.0], [0.0, 400.0, 400.0]]))
    assert clock.position == 1
    assert time_of(torch.tensor([100.0, 400.0])) == 100


def test_what_lies_in_a_table_while_its_layer_is_away_is_not_read() -> None:
    """As offloading to disk leaves it: other data for the same tensor, until the layer is called."""
    clock, first, second = StepClock(STEPS), TABLE.clone(), TABLE.clone()
    for timestep in (740.5, 260.0):
        clock.set(timestep)
        expected = (TABLE * clock.weights).sum(-1, keepdim=True)
        away, second.data = second.data, torch.full_like(second, 99)
        assert torch.equal(clock.select(first), expected)
        second.data = away
        assert torch.equal(clock.select(second), expected)
