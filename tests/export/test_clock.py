"""The step is told by the time step of the call."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from diffpress.export.runtime import StepClock, attach_clock_, find_timestep

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


@pytest.mark.parametrize("steps", [[], [1, 2], [5, 5], [9, 5, 7], [float("nan"), 1]], ids=str)
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


def tables(count: int) -> list[Tensor]:
    """Scales, or zero points far beyond what a code can be."""
    generator = torch.Generator().manual_seed(0)
    return [400 * torch.rand(len(STEPS), generator=generator) - 200 for _ in range(count)]


@pytest.mark.parametrize("timestep", [981, 500, 700.3, 33.3], ids=str)
def test_looking_up_many_tables_at_once_gives_the_same_bits(timestep: float) -> None:
    clock, own = StepClock(STEPS), tables(5)
    clock.set(20)
    for table in own:
        clock.select(table)
        clock.select_code(table)
    clock.set(timestep)
    alone = StepClock(STEPS)
    alone.set(timestep)
    for table in own:
        assert torch.equal(clock.select(table), alone.select(table))
        assert torch.equal(clock.select_code(table), alone.select_code(table))


def test_zero_points_are_codes_of_eight_bits() -> None:
    clock = StepClock(STEPS)
    codes = [clock.select_code(table) for table in (TABLE + 0.3, -1000 * TABLE, 1000 * TABLE)]
    assert [code.tolist() for code in codes] == [[1], [-128], [127]]
    assert {code.dtype for code in codes} == {torch.int32}


def test_tables_that_were_asked_for_are_read_together_at_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, own, stacked = StepClock(STEPS), tables(4), []
    stack = torch.stack
    monkeypatch.setattr(torch, "stack", lambda rows: stacked.append(len(rows)) or stack(rows))
    for table in own:
        clock.select(table)
    clock.set(500)
    assert stacked == [4]
    entries = [clock.select(table) for table in own]
    assert all(entry.data_ptr() % 16 == 0 for entry in entries)
    # One block of memory holds them all.
    assert len({entry.untyped_storage().data_ptr() for entry in entries}) == 1


def test_a_table_that_takes_the_place_of_another_is_read_itself() -> None:
    clock = StepClock(STEPS)
    clock.select(TABLE)
    clock.set(500)
    assert clock.select(TABLE.clone() + 1).item() == 3
    clock.set(20)
    assert clock.select(TABLE).item() == 8


def test_what_is_written_into_a_table_holds_from_the_next_step_on() -> None:
    clock, table = StepClock(STEPS), TABLE.clone()
    clock.select(table)
    clock.set(500)
    table.mul_(2)
    clock.set(500)
    assert clock.select(table).item() == 4
