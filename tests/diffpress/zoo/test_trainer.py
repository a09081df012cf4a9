"""Training that was interrupted ends where uninterrupted training ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from diffpress.zoo.trainer import Schedule, train_

SCHEDULE = Schedule(steps=12, rate=1e-2, warmup=3, save_every=4)


class Interruption(Exception):  # noqa: N818
    """Stands for a kill."""


def build() -> nn.Module:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(3, 9, 3), nn.GELU(), nn.Conv2d(9, 5, 3), nn.Flatten(), nn.Linear(45, 4))
    # As the zoo trains: it changes the layout in which the optimizer keeps its moments.
    return model.to(memory_format=torch.channels_last)


def train(model: nn.Module, checkpoint: Path, stop: int | None = None, seed: int = 0) -> int:
    """Train on noise; with `stop`, be interrupted after so many losses."""
    calls = 0

    def loss(generator: torch.Generator) -> Tensor:
        nonlocal calls
        calls += 1
        if stop is not None and calls > stop:
            raise Interruption
        x = torch.randn(6, 3, 7, 7, generator=generator)
        return F.mse_loss(model(x), x.mean(1)[:, 0, :4])

    return train_(model, loss, SCHEDULE, checkpoint, seed)


def weights(model: nn.Module) -> bytes:
    return save({name: value.contiguous() for name, value in model.state_dict().items()})


@pytest.mark.parametrize("stop", [2, 4, 7, 11])
def test_resumed_training_is_byte_identical(tmp_path: Path, stop: int) -> None:
    whole = build()
    assert train(whole, tmp_path / "whole.safetensors") == 12

    broken, checkpoint = build(), tmp_path / "deep" / "broken.safetensors"
    with pytest.raises(Interruption):
        train(broken, checkpoint, stop)
    assert checkpoint.exists() == (stop >= 4)
    # What the interrupted process had in memory is lost: other weights and another state of torch's generator.
    resumed = build()
    for parameter in resumed.parameters():
        nn.init.normal_(parameter) if stop >= 4 else None
    assert train(resumed, checkpoint) == 12 - stop // 4 * 4
    assert weights(resumed) == weights(whole)
    assert checkpoint.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not list(tmp_path.rglob("*.partial"))


def test_finished_training_takes_no_step(tmp_path: Path) -> None:
    model = build()
    train(model, tmp_path / "a.safetensors")
    again = build()
    assert train(again, tmp_path / "a.safetensors", stop=0) == 0
    assert weights(again) == weights(model)


def test_the_seed_decides_the_batches(tmp_path: Path) -> None:
    first, second = build(), build()
    train(first, tmp_path / "a.safetensors", seed=0)
    train(second, tmp_path / "b.safetensors", seed=1)
    assert weights(first) != weights(second)


def test_frozen_parameters_stay(tmp_path: Path) -> None:
    model = build()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    train(model, tmp_path / "a.safetensors")
    assert torch.equal(model[0].weight, before)


def test_rate_rises_holds_and_falls_to_zero() -> None:
    schedule = Schedule(steps=1000, rate=0.5, warmup=100, cooldown=0.4)
    assert [schedule.rate_at(step) for step in (0, 49, 99, 500, 600)] == [0.005, 0.25, 0.5, 0.5, 0.5]
    assert schedule.rate_at(800) == pytest.approx(0.25)
    assert 0 < schedule.rate_at(999) < 0.002
    assert schedule.rate_at(1000) == 0
