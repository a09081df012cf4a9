"""What a tape knows of each tensor, and what it makes again at another time step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffpress.compress.prune.modulation.time_tape import TimeTape, distinct_rows

FREQUENCIES = torch.tensor([1.0, 0.5, 0.25])


def taped(dtype: torch.dtype = torch.float32) -> tuple[TimeTape, dict[str, Tensor]]:
    """What a little denoiser makes of a time step, a sample and a label."""
    time, sample, label = torch.tensor([2, 2]), torch.ones(2, 3), torch.tensor([4, 5])
    table, weight = torch.randn(9, 3), torch.eye(3, dtype=dtype)
    made: dict[str, Tensor] = {}
    with TimeTape([("time", time), ("sample", sample), ("label", label)], "time") as tape:
        made["angles"] = time[:, None].to(dtype) * FREQUENCIES.to(dtype)
        made["sines"] = torch.sin(made["angles"]) @ weight
        made["a view"] = made["sines"].chunk(3, dim=1)[1]
        made["written into"] = torch.zeros_like(sample)
        made["written into"][:, 1:] = made["sines"][:, :2]
        made["added in place"] = made["sines"].clone().add_(1)
        made["of a label"] = made["sines"] + table[label]
        made["of the sample"] = made["sines"] * sample
        made["a form"] = torch.ones_like(sample)
        made["a constant"] = table * 2
    return tape, made


ALONE = ["angles", "sines", "a view", "written into", "added in place"]


def test_every_tensor_has_its_sources() -> None:
    tape, made = taped()
    found = {name: set(tape.sources([tensor])) for name, tensor in made.items()}
    others = {
        "of a label": {"time", "label"},
        "of the sample": {"time", "sample"},
        "a form": set(),
        "a constant": set(),
    }
    assert found == {name: {"time"} for name in ALONE} | others


@pytest.mark.parametrize("time", [2.0, 3.25, 0.0])
def test_what_time_alone_makes_is_made_again(time: float) -> None:
    """Also between whole steps, where the time step was a whole number."""
    tape, made = taped()
    sines = torch.sin(time * FREQUENCIES)
    expected = {
        "angles": time * FREQUENCIES,
        "sines": sines,
        "a view": sines[1:2],
        "written into": torch.tensor([0.0, *sines[:2]]),
        "added in place": sines + 1,
    }
    found = tape.replay({name: [made[name]] for name in ALONE})(time)
    for name, rows in found.items():
        assert torch.equal(rows, expected[name][None]), name


def test_half_precision_is_made_again_in_float32() -> None:
    tape, made = taped(torch.bfloat16)
    (rows,) = tape.replay({"sines": [made["sines"]]})(2.7).values()
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows[0], torch.sin(2.7 * FREQUENCIES))


def test_what_a_tensor_is_made_with() -> None:
    weight, other, time = torch.eye(3), torch.eye(3), torch.ones(1, 3)
    with TimeTape([("time", time)], "time") as tape:
        inner = time @ weight.T
        outer = inner @ other
    assert tape.reads([outer], weight)
    assert tape.reads([outer], other)
    assert not tape.reads([inner], other)


def test_rows_that_only_rounding_tells_apart_are_one() -> None:
    row = torch.tensor([1.0, 2.0, 3.0])
    rounded = row * (1 + torch.finfo(torch.float32).eps)
    assert torch.equal(distinct_rows([torch.stack([row, rounded]), row[None, None]]), row[None])
    assert torch.equal(distinct_rows([torch.stack([row, 2 * row, 2 * row])]), torch.stack([row, 2 * row]))
